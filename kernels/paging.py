"""Attention and the pages it reads: signatures and promises. What each computes is written out in `reference/`.

T tokens, B sequences, H heads, G key/value heads (G divides H), d head dim. Every operation takes T = 0.
"""

from torch import Tensor

from . import registry
from .reference.precision import autocast, exact


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
    """softmax(scale · q kᵀ) v within each packed sequence; query head h reads key/value head h // (H / G).

    Args:
        cu_seqlens_B1: int, cumulative sequence starts, from 0 to T; empty sequences are fine.
        window: a query sees its own position and the window - 1 before it (and after it, if not causal).
        cu_k_B1: int, cumulative starts of the keys, where sequences have more keys than queries: the q queries of a
            sequence then stand at the last q of its k >= q positions (if not causal: of any k). None = as the queries.
        sinks_H: a score for each head that joins every softmax of its head and has no value (GPT-OSS).
        bias_HR: added to the scores: bias[h, clamp(p_k - p_q, -M, M) + M] at positions p, R = 2M + 1 (T5).

    Returns:
        o_THd (d of v). Differentiable in q, k, v, sinks and bias. Under autocast the operands are cast to its dtype.
    """
    q_THd, k_TGd, v_TGd = autocast(q_THd, k_TGd, v_TGd)
    with exact(q_THd):
        return registry.call(
            "varlen_attention",
            q_THd,
            k_TGd,
            v_TGd,
            cu_seqlens_B1,
            scale=scale,
            causal=causal,
            window=window,
            cu_k_B1=cu_k_B1,
            sinks_H=sinks_H,
            bias_HR=bias_HR,
        )


def store_kv(
    k_TGd: Tensor,
    v_TGd: Tensor | None,
    cache_k: Tensor,
    cache_v: Tensor | None,
    slots_T: Tensor,
    scales_k: Tensor | None = None,
    scales_v: Tensor | None = None,
) -> None:
    """Write keys and values into their pages, in place; without values, keys only.

    Args:
        cache_k, cache_v: [num_blocks, block_size, G, d], contiguous; the values are cast to its dtype. With scales
            int8: each row of d numbers x is kept as round(x / scale) with scale = max |x| / 127, so that no number is
            off by more than scale / 2; a row of zeros has scale 0, one that is not finite has such a scale.
        slots_T: int64, block · block_size + offset; no slot twice, but for those nobody reads (the null block).
        scales_k, scales_v: float32 [num_blocks, block_size, G], contiguous.
    """
    registry.call("store_kv", k_TGd, v_TGd, cache_k, cache_v, slots_T, scales_k, scales_v)


def copy_blocks(pages: Tensor, sources_N: Tensor, targets_N: Tensor) -> None:
    """pages[:, targets[n]] = pages[:, sources[n]], in place; every source is read before any target is written.

    Args:
        pages: [layers, num_blocks, ...].
        sources_N, targets_N: int64 blocks; no target twice.
    """
    registry.call("copy_blocks", pages, sources_N, targets_N)


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
    """Attention of this step's queries to the keys and values in their sequence's pages. Not differentiable.

    Args:
        cache_k, cache_v: [num_blocks, block_size, G, d]; what a page holds beyond a context is never read. The values
            may be a view of the keys' first numbers (latent attention).
        block_tables_BM: int, the blocks of each sequence in order; entries past its context have any value.
        context_lens_B: int, tokens of each sequence, those of this step (already stored) included.
        cu_q_B1: int, cumulative query starts, from 0 to T. Query i of sequence b stands at position
            context_len - query_len + i.
        causal, window, sinks_H, bias_HR: as in `varlen_attention`.
        scales_k, scales_v: of pages of int8, as `store_kv` wrote them; a number is its page's times its row's scale.
    """
    with exact(q_THd):
        return registry.call(
            "paged_attention",
            q_THd,
            cache_k,
            cache_v,
            block_tables_BM,
            context_lens_B,
            cu_q_B1,
            scale=scale,
            causal=causal,
            window=window,
            sinks_H=sinks_H,
            bias_HR=bias_HR,
            scales_k=scales_k,
            scales_v=scales_v,
        )
