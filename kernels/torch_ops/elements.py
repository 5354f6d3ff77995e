"""RMSNorm and rotation for training on a CPU, in one pass each way.

Kept for backward are the norm's input and 1 / rms of each row; of a rotation the cosines and sines.

T tokens, D width, H heads, d head dim, h = d / 2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..cpp import backward as passes
from ..cpp.call import fits


def rms_norm_fits(x_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return weight_D.dtype == torch.float32 and _runs(x_TD, weight_D)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _Norm.apply(x_TD, weight_D, eps)


def rope_fits(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> bool:
    return turns_h.dtype == torch.float32 and _runs(x_THd)


def rope(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> Tensor:
    angles_Th = positions_T[:, None] * turns_h
    return _Rotate.apply(x_THd, angles_Th.cos() * magnitude, angles_Th.sin() * magnitude)


def _runs(*tensors: Tensor) -> bool:
    """On a CPU, outside of compiled code, which fuses the reference; with the same bits where nothing learns."""
    return not torch.compiler.is_compiling() and fits(tensors[0])


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
        y_TD, turns_T = passes.rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, turns_T)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_D, turns_T = ctx.saved_tensors
        return *passes.rms_norm_backward(x_TD, weight_D, turns_T, grad_TD.contiguous()), None


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
        ctx.save_for_backward(cos_Th, sin_Th)
        return passes.rotate(x_THd.contiguous(), cos_Th, sin_Th, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor, None, None]:
        cos_Th, sin_Th = ctx.saved_tensors
        return passes.rotate(grad_THd.contiguous(), cos_Th, sin_Th, -1.0), None, None
