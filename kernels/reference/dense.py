"""The elementwise parts of a transformer block and its loss.

T tokens, D width, H heads, d head dim, h = d / 2, N rows, F hidden width, V vocabulary, K and M a head's input and
output widths.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .precision import wide


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = wide(x_TD)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D).to(x_TD.dtype)


def add_rms_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD + y_TD
    return sum_TD, rms_norm(sum_TD, weight_D, eps)


def rope(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> Tensor:
    angles_Th = positions_T[:, None] * turns_h
    return rotate(x_THd, angles_Th.cos() * magnitude, angles_Th.sin() * magnitude)


def rotate(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
    cos, sin = cos_Th[:, None, :], sin_Th[:, None, :]
    first, second = wide(x_THd).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THd.dtype)


def heads(
    x_TD: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos_Th: Tensor, sin_Th: Tensor,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q_THd, k_TGd, v_TGd = (linear(x_TD, w).unflatten(-1, (-1, 2 * cos_Th.shape[1])) for w in (w_q, w_k, w_v))
    q_THd = q_THd if norm_q is None else rms_norm(q_THd, norm_q, eps)
    k_TGd = k_TGd if norm_k is None else rms_norm(k_TGd, norm_k, eps)
    return rotate(q_THd, cos_Th, sin_Th), rotate(k_TGd, cos_Th, sin_Th), v_TGd


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    logits = wide(logits_TV)
    picked = logits.gather(1, targets_T.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets_T >= 0, logits.logsumexp(dim=1) - picked, 0.0)


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    return cross_entropy(linear(x_TD, w_VD.to(x_TD.dtype)), targets_T)


def square_sum(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    y_TF = x_TD @ w_FD.mT
    return y_TF if bias_F is None else y_TF + bias_F


def head_gemm(x_THK: Tensor, w_HKM: Tensor) -> Tensor:
    return torch.stack([x_TK @ w_KM for x_TK, w_KM in zip(x_THK.unbind(1), w_HKM, strict=True)], 1)


def pointwise(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x)
