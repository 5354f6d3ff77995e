"""What a training step does beside its matrix products, as single passes over memory.

Each function wants contiguous tensors of one type and a CPU (`call.fits`); none is differentiable. N rows, F hidden
width, T tokens, K choices, D width, V vocabulary, d head dim, h = d / 2.
"""

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .call import TYPES, call, pointer

ROWS, BLOCK = 64, 16384  # as in backward.cpp


def swiglu(z_NH: Tensor, out_NF: Tensor) -> None:
    """out = silu(gate) · up."""
    rows, hidden = out_NF.shape
    call("swiglu", TYPES[z_NH.dtype], *_places(z_NH, out_NF), c_int64(rows), c_int64(hidden))


def swiglu_backward(z_NH: Tensor, grad_NF: Tensor, weights_N: Tensor | None, out_NH: Tensor, dots_N: Tensor) -> None:
    """Of h = silu(gate) · up, to whose rows grad · weight comes back: the gradient of z into `out`.

    `grad` becomes h · weight, `dots` Σ grad · h of each row. Weights and dots are float32.
    """
    sizes = (c_int64(size) for size in grad_NF.shape)
    call("swiglu_backward", TYPES[z_NH.dtype], *_places(z_NH, grad_NF, weights_N, out_NH, grad_NF, dots_N), *sizes)


def gather_sum(rows_ND: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """out[t] = Σ_k weights[t, k] · rows[slot[t, k]] in float32, k ascending; a slot below 0 adds nothing."""
    out_TD = rows_ND.new_empty(len(slot_TK), rows_ND.shape[1])
    sizes = (c_int64(size) for size in (*slot_TK.shape, rows_ND.shape[1]))
    call("gather_sum", TYPES[rows_ND.dtype], *_places(rows_ND, slot_TK, weights_TK, out_TD), *sizes)
    return out_TD


def gather_sum_backward(grad_TD: Tensor, rows_ND: Tensor, order_N: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows and weights (float32) where row n is choice order[n]; a choice without a row has 0."""
    drows_ND, dweights_TK = torch.empty_like(rows_ND), torch.zeros_like(weights_TK)
    places = _places(grad_TD, rows_ND, order_N, weights_TK, drows_ND, dweights_TK)
    sizes = (c_int64(size) for size in (len(rows_ND), weights_TK.shape[1], rows_ND.shape[1]))
    call("gather_sum_backward", TYPES[rows_ND.dtype], *places, *sizes)
    return drows_ND, dweights_TK


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / rms of each row in float32."""
    y_TD = x_TD.new_empty(x_TD.shape)
    turns_T = torch.empty(x_TD.shape[:-1], dtype=torch.float32)
    sizes = (c_int64(turns_T.numel()), c_int64(x_TD.shape[-1]))
    call("norm", TYPES[x_TD.dtype], *_places(x_TD, weight_D, y_TD, turns_T), *sizes, c_float(eps))
    return y_TD, turns_T


def rms_norm_backward(x_TD: Tensor, weight_D: Tensor, turns_T: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight (float32)."""
    rows, width = turns_T.numel(), x_TD.shape[-1]
    dx_TD, dweight_D = x_TD.new_empty(x_TD.shape), torch.empty_like(weight_D)
    parts = torch.empty(-(-rows // ROWS), width, dtype=torch.float32)
    places = _places(x_TD, weight_D, turns_T, grad_TD, dx_TD, parts, dweight_D)
    call("norm_backward", TYPES[x_TD.dtype], *places, c_int64(rows), c_int64(width))
    return dx_TD, dweight_D


def rotate(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor, turn: float) -> Tensor:
    """Every head (a, b) → (a · cos - b · sin · turn, b · cos + a · sin · turn); turn -1 is the way back."""
    y_THd = x_THd.new_empty(x_THd.shape)
    sizes = (c_int64(size) for size in (*x_THd.shape[:2], x_THd.shape[2] // 2))
    call("turn_heads", TYPES[x_THd.dtype], *_places(x_THd, cos_Th, sin_Th, y_THd), *sizes, c_float(turn))
    return y_THd


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, learns: bool) -> Tensor:
    """Nats of each token, float32; with `learns` the logits become their gradient. A negative target adds nothing."""
    losses_T = torch.empty(len(logits_TV), dtype=torch.float32)
    sizes = (c_int64(size) for size in (*logits_TV.shape, learns))
    call("cross_entropy", TYPES[logits_TV.dtype], *_places(logits_TV, targets_T, losses_T), *sizes)
    return losses_T


def square_sum(x: Tensor) -> Tensor:
    """Σ x² in float64."""
    parts = torch.empty(-(-x.numel() // BLOCK), dtype=torch.float64)
    call("squares", TYPES[x.dtype], *_places(x, parts), c_int64(x.numel()))
    return parts.sum()


def _places(*tensors: Tensor | None) -> list[c_void_p]:
    return [c_void_p(pointer(tensor)) for tensor in tensors]
