"""Attention as one function of a query row and its keys in order: packed rows and pages give the same bits.

T tokens, H query heads, G key/value heads, d head dim, B sequences, M blocks of a table.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..reference.attention import dequantised, own_keys
from ..torch_ops import attention as library_attention
from .call import TYPES, Attention, call, differentiable, fits, pointer


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
        return _attend(q, k, v, cu_seqlens_B1, keys_B1, None, 0, scale, causal, window, sinks, bias)

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
    return fits(q_THd) and (scales_k is not None or fits(cache_k, cache_v))


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
    if scales_k is not None and scales_v is not None:  # only the pages at hand are widened
        blocks = torch.arange(block_tables_BM.shape[1]) * cache_k.shape[1] < context_lens_B[:, None]
        pages = block_tables_BM.masked_fill(~blocks, 0).long().flatten()
        cache_k, cache_v = (dequantised(c[pages], s[pages]) for c, s in ((cache_k, scales_k), (cache_v, scales_v)))
        block_tables_BM = torch.arange(len(pages)).view(block_tables_BM.shape)
    keys, values, page = cache_k.flatten(0, 1), cache_v.flatten(0, 1), cache_k.shape[1]
    rest = (page, scale, causal, window, sinks_H, bias_HR)
    return _attend(q_THd, keys, values, cu_q_B1, context_lens_B, block_tables_BM, *rest)


def _attend(
    q_THd: Tensor, k_SGd: Tensor, v_SGd: Tensor, cu_q_B1: Tensor, keys_B: Tensor, table_BM: Tensor | None, page: int,
    scale: float, causal: bool, window: int | None, sinks_H: Tensor | None, bias_HR: Tensor | None,
) -> Tensor:  # fmt: skip
    """`keys_B` are the borders of the keys, or with pages the contexts' lengths."""
    q_THd = q_THd.contiguous()
    k_SGd, v_SGd = (t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous() for t in (k_SGd, v_SGd))
    cu_q_B1, keys_B = cu_q_B1.int().contiguous(), keys_B.int().contiguous()
    table_BM = None if table_BM is None else table_BM.clamp(max=2**31 - 1).int().contiguous()
    sinks_H, bias_HR = (None if t is None else t.float().contiguous() for t in (sinks_H, bias_HR))
    o_THd = q_THd.new_empty(*q_THd.shape[:2], v_SGd.shape[2])
    it = Attention(
        q_THd.data_ptr(), k_SGd.data_ptr(), v_SGd.data_ptr(), o_THd.data_ptr(),
        cu_q_B1.data_ptr(), keys_B.data_ptr(), pointer(table_BM), pointer(sinks_H), pointer(bias_HR),
        len(cu_q_B1) - 1, q_THd.shape[1], k_SGd.shape[1], q_THd.shape[2], v_SGd.shape[2],
        k_SGd.stride(0), v_SGd.stride(0), k_SGd.stride(1), v_SGd.stride(1),
        0 if table_BM is None else table_BM.shape[1], page, 0 if bias_HR is None else bias_HR.shape[1] // 2,
        causal, min(window or 0, 2**40), scale,
    )  # fmt: skip
    call("attention", TYPES[q_THd.dtype], TYPES[k_SGd.dtype], ctypes.byref(it))
    return o_THd
