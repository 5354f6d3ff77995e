"""Writing keys and values into their pages, as they are or as eight bits a number with a scale a row.

T tokens, G key/value heads, d head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .probe import FLOATS, runs

ROUND = 1.5 * 2**23  # a float32 of up to 2²² plus this has no digits after the point: rounded to nearest even


@triton.jit
def _store_row(  # type: ignore[no-untyped-def]
    new, cache, scales, token, group, slot, d, new_token, new_head, row, WIDTH: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One head of one token. `row`: numbers of a token in the cache."""
    at = tl.arange(0, WIDTH)
    x = tl.load(new + token * new_token + group * new_head + at, mask=at < d, other=0.0)
    if scales is not None:
        x = x.to(tl.float32)
        broken = tl.sum((x != x).to(tl.int32), 0) > 0
        scale = tl.div_rn(tl.max(tl.abs(x), 0), 127.0)
        scale = tl.where(broken, float("nan"), scale)
        tl.store(scales + slot * tl.num_programs(1) + group, scale)
        sound = (scale > 0) & (scale < float("inf"))
        x = tl.where(sound, tl.div_rn(x, tl.where(sound, scale, 1.0)), 0.0)
        x = (x + ROUND) - ROUND
    tl.store(cache + slot * row + group * d + at, x.to(cache.dtype.element_ty), mask=at < d)


@triton.jit
def store_kernel(  # type: ignore[no-untyped-def]
    k, v, cache_k, cache_v, scales_k, scales_v, slots, D, V, k_token, k_head, v_token, v_head,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One head of one token: its key and, where there is one, its value."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    G = tl.num_programs(1)
    _store_row(k, cache_k, scales_k, token, group, slot, D, k_token, k_head, G * D, WIDTH_K, ROUND)
    if v is not None:
        _store_row(v, cache_v, scales_v, token, group, slot, V, v_token, v_head, G * V, WIDTH_V, ROUND)


def store_kv_fits(
    k_TGd: Tensor,
    v_TGd: Tensor | None,
    cache_k: Tensor,
    cache_v: Tensor | None,
    slots_T: Tensor,
    scales_k: Tensor | None = None,
    scales_v: Tensor | None = None,
) -> bool:
    pages = [t for t in (cache_k, cache_v) if t is not None]
    kinds = FLOATS if scales_k is None else (torch.int8,)
    return runs(k_TGd) and all(page.is_contiguous() and page.dtype in kinds for page in pages)


def store_kv_pays(
    k_TGd: Tensor,
    v_TGd: Tensor | None,
    cache_k: Tensor,
    cache_v: Tensor | None,
    slots_T: Tensor,
    scales_k: Tensor | None = None,
    scales_v: Tensor | None = None,
) -> bool:
    return k_TGd.is_cuda


def store_kv(
    k_TGd: Tensor,
    v_TGd: Tensor | None,
    cache_k: Tensor,
    cache_v: Tensor | None,
    slots_T: Tensor,
    scales_k: Tensor | None = None,
    scales_v: Tensor | None = None,
) -> None:
    T, G, D = k_TGd.shape
    if k_TGd.numel() == 0:
        return
    k = k_TGd if k_TGd.stride(-1) == 1 else k_TGd.contiguous()
    v = None if v_TGd is None or cache_v is None else v_TGd
    v = v if v is None or v.stride(-1) == 1 else v.contiguous()
    V, strides = (1, (0, 0)) if v is None else (v.shape[-1], v.stride()[:2])
    store_kernel[(T, G)](
        k, v, cache_k, cache_v, scales_k, scales_v, slots_T, D, V, *k.stride()[:2], *strides,
        triton.next_power_of_2(D), triton.next_power_of_2(V), ROUND,
    )  # fmt: skip
