"""Products with weights of eight or four bits in C++ (VNNI where the CPU has it).

T tokens, K choices, D input width, F output width.
"""

import ctypes
from collections.abc import Mapping
from ctypes import c_int64, c_void_p
from types import MappingProxyType

from torch import Tensor

from ..quantized import QuantizedWeight, Rows
from .call import TYPES, call, fits, pointer

DIGITS: Mapping[Rows, int] = MappingProxyType({"float": 2, "int8": 1})
"""Of eight bits that a row is written in."""


class Weight(ctypes.Structure):
    """`Weight` of quantized.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "scale", "zero")),
        *((name, c_int64) for name in ("bits", "columns", "depth", "groups", "digits")),
    )

    @classmethod
    def of(cls, w: QuantizedWeight) -> "Weight":
        zero = w.zero.data_ptr() if w.zero.numel() else None
        digits = 0 if w.kind == "float" else DIGITS[w.rows]
        return cls(w.q.data_ptr(), w.scale.data_ptr(), zero, w.bits, w.q.shape[-2], w.depth, w.groups, digits)


class Mixture(ctypes.Structure):
    """`Mixture` of quantized.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "ids", "weights", "kept", "y")),
        *((name, c_int64) for name in ("tokens", "choices", "experts")),
        ("w_in", Weight),
        ("w_out", Weight),
    )


def quantized_linear_fits(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> bool:
    return fits(x_TD) and not x_TD.requires_grad


def quantized_linear_pays(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> bool:
    return x_TD.device.type == "cpu"


def quantized_linear(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> Tensor:
    assert x_TD.shape[-1] == w.depth, "a row of another width would be read past its end"
    x_TD = x_TD.contiguous()
    bias_F = None if bias_F is None else bias_F.float().contiguous()
    y_TF = x_TD.new_empty(*x_TD.shape[:-1], w.q.shape[-2])
    rows = c_int64(x_TD.numel() // w.depth)
    places = c_void_p(x_TD.data_ptr()), ctypes.byref(Weight.of(w)), c_void_p(pointer(bias_F)), c_void_p(y_TF.data_ptr())
    call("quantized_linear", TYPES[x_TD.dtype], *places, rows)
    return y_TF


def quantized_moe_mlp_fits(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> bool:
    return fits(x_TD) and not x_TD.requires_grad and not weights_TK.requires_grad


def quantized_moe_mlp_pays(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> bool:
    return x_TD.device.type == "cpu"


def quantized_moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> Tensor:
    assert x_TD.shape[-1] == w_in.depth, "a row of another width would be read past its end"
    x_TD, ids_TK, weights_TK = x_TD.contiguous(), ids_TK.contiguous(), weights_TK.float().contiguous()
    kept_TK = None if kept_TK is None else kept_TK.contiguous()
    y_TD = x_TD.new_empty(x_TD.shape)
    it = Mixture(
        x_TD.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr(), pointer(kept_TK), y_TD.data_ptr(),
        *ids_TK.shape, len(w_in.q), Weight.of(w_in), Weight.of(w_out),
    )  # fmt: skip
    call("quantized_moe", TYPES[x_TD.dtype], ctypes.byref(it))
    return y_TD
