"""A mixture of experts behind its router in one call, for inference.

T tokens, K choices, N choices of all tokens, D width, S width of a stripe, E experts, F hidden width, H = 2F.
"""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .build import library
from .call import TYPES, call, fits, inferring, pointer

LASTING = 8 << 20  # numbers that the allocator keeps between calls, whose pages are there already
LEAST = 256  # columns


class Moe(ctypes.Structure):
    """`Moe` of moe.h."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "x", "ids", "weights", "kept", "w_in", "w_out", "hidden", "rows", "y",
        )),
        *((name, c_int64) for name in (
            "tokens", "choices", "width", "units", "experts", "stripe",
            "x_row", "in_expert", "in_row", "out_expert", "out_row",
        )),
    )  # fmt: skip


def moe_mlp_pays(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> bool:
    """Where bfloat16 has an instruction of its own."""
    kernels = library() if x_TD.dtype == torch.bfloat16 and inferring(x_TD) else None
    return kernels is not None and bool(kernels.turnout_moe_pairs())


def moe_mlp_fits(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> bool:
    """No gradient is wanted, and the rows of both stacks are contiguous."""
    operands = (x_TD, w_in_EHD, w_out_EFD)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*operands, weights_TK))
    rows = w_in_EHD.stride(2) == 1 and w_out_EFD.stride(2) == 1
    return not wanted and rows and weights_TK.dtype != torch.float64 and fits(*operands)


def moe_mlp(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> Tensor:
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.float().contiguous()
    kept_TK = None if kept_TK is None else kept_TK.contiguous()
    (tokens, choices), (experts, hidden, width) = ids_TK.shape, w_out_EFD.shape
    paired = x_TD.dtype == torch.bfloat16 and call("moe_pairs")
    h_NF = x_TD.new_empty(tokens * choices, hidden + hidden % 2, dtype=x_TD.dtype if paired else torch.float32)
    stripe = min(width, max(LEAST, LASTING // max(tokens * choices, 1) // LEAST * LEAST))
    y_NS = x_TD.new_empty(tokens * choices, stripe)
    y_TD = x_TD.new_empty(tokens, width)
    moe = Moe(
        *map(pointer, (x_TD, ids_TK, weights_TK, kept_TK, w_in_EHD, w_out_EFD, h_NF, y_NS, y_TD)),
        tokens, choices, width, hidden, experts, stripe,
        x_TD.stride(0), *w_in_EHD.stride()[:2], *w_out_EFD.stride()[:2],
    )  # fmt: skip
    call("moe_mlp", TYPES[x_TD.dtype], ctypes.byref(moe))
    return y_TD
