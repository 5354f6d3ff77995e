"""Attention as one function of a query row and its keys in order: packed rows and pages give the same bits.

Pages may lie in any order of tokens and heads: the kernel takes their strides. int8 pages are read as they are.

T tokens, H query heads, G key/value heads, d head dim, B sequences, M blocks of a table.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..reference.attention import own_keys
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
    operands = (q_THd, k_TGd, v_TGd, sinks_H, bias_HR)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    return q_THd.device.type == "cpu" and not wanted


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
    return fits(q_THd) and (scales_k is not None or fits(cache_k, cache_v))


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
    return q_THd.device.type == "cpu" and not (torch.is_grad_enabled() and q_THd.requires_grad)


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
    q_THd, k, v = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (q_THd, k, v))
    cu_q_B1, keys_B = _int32(cu_q_B1), _int32(keys_B)
    table_BM = None if table_BM is None else _int32(table_BM)
    sinks_H, bias_HR = (None if t is None else t.float().contiguous() for t in (sinks_H, bias_HR))
    o_THd = q_THd.new_empty(*q_THd.shape[:2], v.shape[-1])
    k_strides, v_strides = ((0, *t.stride())[-4:] for t in (k, v))
    it = Attention(
        q_THd.data_ptr(), k.data_ptr(), v.data_ptr(), o_THd.data_ptr(), cu_q_B1.data_ptr(), keys_B.data_ptr(),
        pointer(table_BM), pointer(sinks_H), pointer(bias_HR), pointer(scales_k), pointer(scales_v),
        len(cu_q_B1) - 1, q_THd.shape[1], k.shape[-2], q_THd.shape[2], v.shape[-1], *q_THd.stride()[:2],
        *k_strides[:3], *v_strides[:3], 0 if table_BM is None else table_BM.shape[1],
        0 if table_BM is None else k.shape[1], 0 if bias_HR is None else bias_HR.shape[1] // 2,
        causal, min(window or 0, 2**40), scale,
    )  # fmt: skip
    call("attention", TYPES[q_THd.dtype], TYPES.get(k.dtype, 3), ctypes.byref(it))
    return o_THd


def _int32(t: Tensor) -> Tensor:
    return t if t.dtype == torch.int32 and t.is_contiguous() else t.int().contiguous()
