"""Attention one sequence at a time, over packed rows or over pages.

T tokens, H query heads, G key/value heads, d head dim, S queries and L keys of one sequence, B sequences.
"""

import itertools

import torch
from torch import Tensor

from .precision import wide


def visible(q_at_S: Tensor, k_at_L: Tensor, causal: bool, window: int | None) -> Tensor:
    """Bool [S, L]: may the query at this position see the key at that one."""
    ahead = k_at_L - q_at_S[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen if window is None else seen & (ahead.abs() < window)


def own_keys(cu_seqlens_B1: Tensor, cu_k_B1: Tensor | None) -> Tensor:
    """The borders of the keys."""
    return cu_seqlens_B1 if cu_k_B1 is None else cu_k_B1


def distance_bias(bias_HR: Tensor, q_at_S: Tensor, k_at_L: Tensor) -> Tensor:
    """[H, S, L]: the bias of each head at the distance from each query to each key."""
    longest = bias_HR.shape[1] // 2
    return bias_HR[:, (k_at_L - q_at_S[:, None]).clamp(-longest, longest) + longest]


def attend(
    q_SHd: Tensor, k_LGd: Tensor, v_LGd: Tensor, seen_SL: Tensor, scale: float,
    sinks_H: Tensor | None = None, bias_HSL: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ + bias) v where seen, in float32; a sink is one more score, of a key without value."""
    groups = q_SHd.shape[1] // k_LGd.shape[1]
    k, v = (wide(t).repeat_interleave(groups, dim=1) for t in (k_LGd, v_LGd))
    scores = torch.einsum("shd,lhd->hsl", wide(q_SHd), k) * scale
    if bias_HSL is not None:
        scores = scores + bias_HSL
    scores = scores.masked_fill(~seen_SL, float("-inf"))
    if sinks_H is not None:
        scores = torch.cat((scores, sinks_H[:, None, None].expand(-1, scores.shape[1], 1).to(scores.dtype)), -1)
    probabilities = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hsl,lhd->shd", probabilities, v).to(q_SHd.dtype)


def nothing(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """The attention of no queries to no keys, [0, H, d of v]; a backward pass still reaches what made q, k and v.

    An encoder's experts on a rank without tokens take part in their exchange only if it does.
    """
    seen_00 = torch.ones(0, 0, dtype=torch.bool, device=q_THd.device)
    return attend(q_THd[:0], k_TGd[:0], v_TGd[:0], seen_00, 1.0)


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
    outputs = [nothing(q_THd, k_TGd, v_TGd)]
    queries, keys = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_B1, own_keys(cu_seqlens_B1, cu_k_B1)))
    for (start, end), (first, last) in zip(queries, keys, strict=True):
        k_at = torch.arange(last - first, device=q_THd.device)
        q_at = torch.arange(last - first - (end - start), last - first, device=q_THd.device)
        bias_HSL = None if bias_HR is None else distance_bias(bias_HR, q_at, k_at)
        seen_SL = visible(q_at, k_at, causal, window)
        q, k, v = q_THd[start:end], k_TGd[first:last], v_TGd[first:last]
        outputs.append(attend(q, k, v, seen_SL, scale, sinks_H, bias_HSL))
    return torch.cat(outputs)


def quantise(x_TGd: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 of the same shape, float32 scale [T, G]): x ≈ q · scale, symmetric in each row."""
    x = wide(x_TGd)
    scale_TG = x.abs().amax(-1).float() / 127
    q_TGd = torch.where(scale_TG[..., None] > 0, x / scale_TG[..., None], 0.0)
    return q_TGd.round().to(torch.int8), scale_TG


def dequantised(cache: Tensor, scales: Tensor | None) -> Tensor:
    """The numbers that rows of a cache stand for."""
    return cache if scales is None else cache * scales[..., None]


def store_kv(
    k_TGd: Tensor, v_TGd: Tensor | None, cache_k: Tensor, cache_v: Tensor | None, slots_T: Tensor,
    scales_k: Tensor | None = None, scales_v: Tensor | None = None,
) -> None:  # fmt: skip
    for new, cache, scales in ((k_TGd, cache_k, scales_k), (v_TGd, cache_v, scales_v)):
        if new is None or cache is None:
            continue
        if scales is not None:
            new, scale_TG = quantise(new)
            scales.view(-1, *scales.shape[2:]).index_copy_(0, slots_T, scale_TG)
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots_T, new.to(cache.dtype))


def copy_blocks(pages: Tensor, sources_N: Tensor, targets_N: Tensor) -> None:
    pages.index_copy_(1, targets_N, pages.index_select(1, sources_N))


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
    outputs = [q_THd.new_empty(0, q_THd.shape[1], cache_v.shape[3])]
    spans = itertools.pairwise(cu_q_B1.tolist())
    for (start, end), length, table in zip(spans, context_lens_B.tolist(), block_tables_BM, strict=True):
        size, first = cache_k.shape[1], 0 if window is None else max(length - (end - start) - window + 1, 0)
        blocks, gone = table[first // size : -(-length // size)].long(), first // size * size
        rows = slice(first - gone, length - gone)
        k_LGd, v_LGd = (
            dequantised(cache[blocks], None if scales is None else scales[blocks])
            .flatten(0, 1)[rows]
            .to(wide(q_THd[:0]).dtype)
            for cache, scales in ((cache_k, scales_k), (cache_v, scales_v))
        )
        k_at = torch.arange(first, length, device=q_THd.device)
        q_at = torch.arange(length - (end - start), length, device=q_THd.device)
        bias_HSL = None if bias_HR is None else distance_bias(bias_HR, q_at, k_at)
        seen_SL = visible(q_at, k_at, causal, window)
        outputs.append(attend(q_THd[start:end], k_LGd, v_LGd, seen_SL, scale, sinks_H, bias_HSL))
    return torch.cat(outputs).to(q_THd.dtype)
