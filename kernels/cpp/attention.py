"""Attention as one function of a query row and its keys in order: packed rows and pages give the same bits.

Pages may lie in any order of tokens and heads: the kernel takes their strides. int8 pages are read as they are.

T tokens, H query heads, G key/value heads, d head dim, B sequences, M blocks of a table.
"""

from struct import Struct
from typing import Any

import torch
from torch import Tensor

from ..reference.attention import own_keys
from ..torch_ops import attention as library_attention
from .build import library
from .call import INT8, TYPES, call, differentiable, fits, inferring, pointer

ATTENTION = Struct("11P18qf4x")  # `Attention` of attention.h


def attends_in_place(dtype: torch.dtype) -> bool:
    """Whether inference with rows of this type reads keys and values where they lie, and writes its result alone."""
    return dtype in TYPES and library() is not None


def varlen_attention_fits(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    cu_k_B1: Tensor | None = None,
    sinks_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
) -> bool:
    return fits(q_THd, k_TGd, v_TGd)


def varlen_attention_pays(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    cu_k_B1: Tensor | None = None,
    sinks_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
) -> bool:
    return inferring(q_THd)


def varlen_attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    cu_k_B1: Tensor | None = None,
    sinks_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
) -> Tensor:
    keys_B1 = own_keys(cu_seqlens_B1, cu_k_B1)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None) -> Tensor:
        return _attend(q, k, v, cu_seqlens_B1, keys_B1, None, scale, causal, window, sinks, bias)

    def twin(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None) -> Tensor:
        own: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "cu_k_B1": cu_k_B1}
        return library_attention.varlen_attention(q, k, v, cu_seqlens_B1, **own, sinks_H=sinks, bias_HR=bias)

    return differentiable(run, twin, q_THd, k_TGd, v_TGd, sinks_H, bias_HR)


def paged_attention_fits(
    q_THd: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables_BM: Tensor,
    context_lens_B: Tensor,
    cu_q_B1: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
    scales_k: Tensor | None = None,
    scales_v: Tensor | None = None,
) -> bool:
    known = scales_k is not None or cache_k.dtype in TYPES
    return known and q_THd.dtype in TYPES and q_THd.is_cpu and library() is not None


def paged_attention_pays(
    q_THd: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables_BM: Tensor,
    context_lens_B: Tensor,
    cu_q_B1: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
    scales_k: Tensor | None = None,
    scales_v: Tensor | None = None,
) -> bool:
    return inferring(q_THd)


def paged_attention(
    q_THd: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    block_tables_BM: Tensor,
    context_lens_B: Tensor,
    cu_q_B1: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    bias_HR: Tensor | None = None,
    scales_k: Tensor | None = None,
    scales_v: Tensor | None = None,
) -> Tensor:
    rest = (cu_q_B1, context_lens_B, block_tables_BM, scale, causal, window, sinks_H, bias_HR, scales_k, scales_v)
    return _attend(q_THd, cache_k, cache_v, *rest)


def _attend(
    q_THd: Tensor, k: Tensor, v: Tensor, cu_q_B1: Tensor, keys_B: Tensor, table_BM: Tensor | None,
    scale: float, causal: bool, window: int | None, sinks_H: Tensor | None, bias_HR: Tensor | None,
    scales_k: Tensor | None = None, scales_v: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Keys and values are packed, [S, G, d], and `keys_B` their borders; or pages, and `keys_B` the lengths."""
    q_THd, k, v = _rows(q_THd), _rows(k), _rows(v)
    cu_q_B1, keys_B = _int32(cu_q_B1), _int32(keys_B)
    T, H, d = q_THd.shape
    *_, page, G, _ = k.shape
    table, longest, sinks, bias = 0, 0, 0, 0
    if sinks_H is not None:
        sinks_H = sinks_H.float().contiguous()
        sinks = sinks_H.data_ptr()
    if bias_HR is not None:
        bias_HR = bias_HR.float().contiguous()
        bias, longest = bias_HR.data_ptr(), bias_HR.shape[1] // 2
    if table_BM is not None:
        table_BM = _int32(table_BM)
        table, blocks = table_BM.data_ptr(), table_BM.shape[1]
    else:
        page = blocks = 0
    o_THd = q_THd.new_empty(T, H, v.shape[-1])
    arguments = ATTENTION.pack(
        q_THd.data_ptr(), k.data_ptr(), v.data_ptr(), o_THd.data_ptr(), cu_q_B1.data_ptr(), keys_B.data_ptr(),
        table, sinks, bias, pointer(scales_k) or 0, pointer(scales_v) or 0,
        len(cu_q_B1) - 1, H, G, d, v.shape[-1], *q_THd.stride()[:2], *(0, *k.stride())[-4:-1],
        *(0, *v.stride())[-4:-1], blocks, page, longest, causal, min(window or 0, 2**40), scale,
    )  # fmt: skip
    call("attention", TYPES[q_THd.dtype], TYPES.get(k.dtype, INT8), arguments)
    return o_THd


def _rows(t: Tensor) -> Tensor:
    """Rows of neighbours."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _int32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.int32 and t.is_contiguous() else t.int().contiguous()
