"""Queries, keys and values in one pass over their matrices.

T tokens, D width, H heads, G key/value heads, d head dim, h = d / 2.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ..torch_ops import layers
from .call import TYPES, fits, kernel, pointer
from .rowwise import pays


class Heads(ctypes.Structure):
    """`Heads` of heads.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "x", "w_q", "w_k", "w_v", "q", "k", "v", "norm_q", "norm_k", "cos", "sin",
        )),
        *((name, c_int64) for name in ("rows", "depth", "heads", "kv_heads", "d", "norm_type")),
        ("eps", c_float),
    )  # fmt: skip


def heads_pays(
    x_TD: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos_Th: Tensor, sin_Th: Tensor,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, eps: float = 0.0,
) -> bool:  # fmt: skip
    return pays(x_TD)


def heads_fits(
    x_TD: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos_Th: Tensor, sin_Th: Tensor,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, eps: float = 0.0,
) -> bool:  # fmt: skip
    alike = fits(x_TD, w_q, w_k, w_v) and fits(cos_Th, sin_Th) and cos_Th.dtype == torch.float32
    return alike and (norm_q is None or fits(norm_q, norm_k)) and not torch.is_autocast_enabled("cpu")


def heads(
    x_TD: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos_Th: Tensor, sin_Th: Tensor,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    leaves = x_TD, w_q, w_k, w_v, norm_q, norm_k
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        return layers.heads(x_TD, w_q, w_k, w_v, cos_Th, sin_Th, norm_q, norm_k, eps)
    x_TD, w_q, w_k, w_v = (t.contiguous() for t in (x_TD, w_q, w_k, w_v))
    cos_Th, sin_Th = cos_Th.contiguous(), sin_Th.contiguous()
    norm_q, norm_k = (None if t is None else t.contiguous() for t in (norm_q, norm_k))
    (tokens, depth), d, dtype = x_TD.shape, 2 * cos_Th.shape[1], x_TD.dtype
    count, kv_count = len(w_q) // d, len(w_k) // d
    q_THd, k_TGd = torch.empty(tokens, count, d, dtype=dtype), torch.empty(tokens, kv_count, d, dtype=dtype)
    v_TGd = torch.empty_like(k_TGd)
    it = Heads(
        x_TD.data_ptr(), w_q.data_ptr(), w_k.data_ptr(), w_v.data_ptr(), q_THd.data_ptr(), k_TGd.data_ptr(),
        v_TGd.data_ptr(), pointer(norm_q), pointer(norm_k), cos_Th.data_ptr(), sin_Th.data_ptr(),
        tokens, depth, count, kv_count, d, 0 if norm_q is None else TYPES[norm_q.dtype], eps,
    )  # fmt: skip
    kernel("turnout_heads", (c_int, c_void_p, c_int))(TYPES[dtype], ctypes.byref(it), torch.get_num_threads())
    return q_THd, k_TGd, v_TGd
