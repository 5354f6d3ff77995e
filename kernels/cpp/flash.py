"""Attention for training in bfloat16 without scores in memory: q, k, v, the output and a number a row are kept.

T tokens, H query heads, G key/value heads, d head dim.
"""

from ctypes import c_int
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .call import call, fits

FLASH = Struct("11P6qf4x")  # `Flash` of flash.cpp
WIDEST = 256  # of a head


def runs(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> bool:
    """bfloat16 on a CPU; heads of a multiple of 32 numbers, of values as many as of keys."""
    d = q_THd.shape[2]
    square = d == v_TGd.shape[2] and d % 32 == 0 and 0 < d <= WIDEST
    return square and q_THd.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and fits(q_THd, k_TGd, v_TGd)


def attention(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool,
    window: int | None,
) -> Tensor:  # fmt: skip
    """As `ops.varlen_attention`."""
    return _Flash.apply(q_THd, k_TGd, v_TGd, cu_q, cu_k, scale, causal, window)


class _Flash(Function):
    @staticmethod
    def forward(
        ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        q_THd, k_TGd, v_TGd = q_THd.contiguous(), k_TGd.contiguous(), v_TGd.contiguous()
        cu_q, cu_k = cu_q.int().contiguous(), cu_k.int().contiguous()
        o_THd, lse_TH = torch.empty_like(q_THd), torch.empty(q_THd.shape[:2])
        ctx.settings = (causal, window or 0, scale)
        _run((q_THd, k_TGd, v_TGd, cu_q, cu_k, o_THd, lse_TH), (None,) * 4, ctx.settings, back=False)
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, cu_q, cu_k, o_THd, lse_TH)
        return o_THd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = tuple(torch.empty_like(tensor) for tensor in saved[:3])
        _run(saved, (grad_THd.contiguous(), *gradients), ctx.settings, back=True)
        return *gradients, None, None, None, None, None


def _run(
    kept: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], settings: tuple[bool, int, float], back: bool
) -> None:
    q_THd, k_TGd, _, cu_q, *_ = kept
    places = (0 if tensor is None else tensor.data_ptr() for tensor in (*kept, *gradients))
    causal, window, scale = settings
    sizes = (len(cu_q) - 1, q_THd.shape[1], k_TGd.shape[1], q_THd.shape[2], causal, window)
    call("flash", FLASH.pack(*places, *sizes, scale), c_int(back))
