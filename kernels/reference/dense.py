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


def rope(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> Tensor:
    angles_T1h = (positions_T[:, None] * turns_h)[:, None, :]
    cos, sin = angles_T1h.cos() * magnitude, angles_T1h.sin() * magnitude
    first, second = wide(x_THd).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THd.dtype)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    logits = wide(logits_TV)
    picked = logits.gather(1, targets_T.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets_T >= 0, logits.logsumexp(dim=1) - picked, 0.0)


def linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    y_TF = x_TD @ w_FD.mT
    return y_TF if bias_F is None else y_TF + bias_F


def head_gemm(x_THK: Tensor, w_HKM: Tensor) -> Tensor:
    return torch.stack([x_TK @ w_KM for x_TK, w_KM in zip(x_THK.unbind(1), w_HKM, strict=True)], 1)


def pointwise(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x)
