"""What a layer does around its matrix products, made of other operations, each in its own form.

T tokens, D width, H heads, G key/value heads, d head dim, h = d / 2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..registry import call


def add_rms_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD + y_TD
    return sum_TD, call("rms_norm", sum_TD, weight_D, eps)


def heads(
    x_TD: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos_Th: Tensor, sin_Th: Tensor,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (-1, 2 * cos_Th.shape[1])
    operands = zip(_cast_once(x_TD), (w_q, w_k, w_v), strict=True)
    q_THd, k_TGd, v_TGd = (call("linear", own_TD, w, None).unflatten(-1, shape) for own_TD, w in operands)
    q_THd = q_THd if norm_q is None else call("rms_norm", q_THd, norm_q, eps)
    k_TGd = k_TGd if norm_k is None else call("rms_norm", k_TGd, norm_k, eps)
    return call("rotate", q_THd, cos_Th, sin_Th), call("rotate", k_TGd, cos_Th, sin_Th), v_TGd


def _cast_once(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x for three products: autocast would keep a copy for each of them."""
    narrows = torch.is_autocast_enabled("cpu") and x_TD.is_cpu and x_TD.dtype == torch.float32
    if not narrows or torch.compiler.is_compiling():
        return x_TD, x_TD, x_TD
    return _Thrice.apply(x_TD, torch.get_autocast_dtype("cpu"))


class _Thrice(Function):
    """One copy, and gradients that are added up in the type of x."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtype, y_TD = x_TD.dtype, x_TD.to(dtype)
        return y_TD, y_TD.view_as(y_TD), y_TD.view_as(y_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_TD: Tensor, k_TD: Tensor, v_TD: Tensor) -> tuple[Tensor, None]:
        return v_TD.to(ctx.dtype).add_(k_TD).add_(q_TD), None
