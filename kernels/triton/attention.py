"""Attention to pages, of prompts and of single tokens in one kernel.

A program has some of a sequence's queries with the heads that share their keys as its rows. Keys are divided into
chunks of fixed length from the sequence's start and the chunks' results merged in their order: by programs of their own
and a second kernel where there are few queries, else by the one program, with the same bits. What a chunk gives depends
on nothing but the query and its keys.

T queries, B sequences, H query heads, G key/value heads, R = H / G, C chunks.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import PROGRAMS, AttentionTile, attention_tile, halves
from .probe import FLOATS, runs

LOG2E = math.log2(math.e)
_PARTS = 1 << 26  # bytes that chunks of their own may leave for the second kernel


@triton.jit
def _merge(top, total, sums, next_top, next_total, next_sums):
    """Two parts of a softmax: highest score, sum of the exponentials above it, sums of the values weighted by them."""
    highest = tl.maximum(top, next_top)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    mine, other = tl.exp2(top - base), tl.exp2(next_top - base)
    return highest, total * mine + next_total * other, sums * mine[:, None] + next_sums * other[:, None]


@triton.jit
def _finish(top, total, sums, sinks, head, ok, LOG2E: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values' mean and the sum's logarithm. A sink joins the sum; a row that saw nothing is zero."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=ok, other=0.0).to(tl.float32) * LOG2E
        top, total, sums = _merge(top, total, sums, sink, tl.full(sink.shape, 1.0, tl.float32), tl.zeros_like(sums))
    norm = tl.where(total > 0, top + tl.log2(total), float("inf"))
    return sums / tl.where(total > 0, total, 1.0)[:, None], norm


@triton.jit
def _chunk(  # type: ignore[no-untyped-def]
    q, q_rest, k, v, scales_k, scales_v, table, bias, start, stop, position, scale, window, longest, D, V,
    k_block, k_line, v_block, v_line, s_block, s_line, SIZE: tl.constexpr, KEYS: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, LATENT: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """The part of the softmax of the keys from `start` up to `stop`."""
    ROWS: tl.constexpr = q.shape[0]
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    main, value = tl.arange(0, MAIN), tl.arange(0, WIDTH)
    for first in range(start, stop, KEYS):
        at = first + tl.arange(0, KEYS)
        there = at < stop
        if table is None:
            block, place = at.to(tl.int64) * 0, at.to(tl.int64)
        else:
            block, place = tl.load(table + at // SIZE, mask=there, other=0).to(tl.int64), at % SIZE
        k_at = k + block * k_block + place * k_line
        k_tile = tl.load(k_at[None, :] + main[:, None], mask=there[None, :] & (main < D)[:, None], other=0.0)
        k_tile = k_tile.to(q.dtype)
        scores = tl.dot(q, k_tile, input_precision="ieee")
        if REST > 0:
            rest = MAIN + tl.arange(0, REST)
            rest_tile = tl.load(k_at[None, :] + rest[:, None], mask=there[None, :] & (rest < D)[:, None], other=0.0)
            scores = tl.dot(q_rest, rest_tile.to(q.dtype), scores, input_precision="ieee")
        if scales_k is not None:
            line = block * s_block + place * s_line
            scores *= tl.load(scales_k + line, mask=there, other=0.0)[None, :]
        scores *= scale
        ahead = at[None, :] - position[:, None]
        if bias is not None:
            away = tl.minimum(tl.maximum(ahead, -longest), longest) + longest
            scores += tl.load(bias[:, None] + away).to(tl.float32) * LOG2E
        seen = there[None, :] & (ahead <= 0) if CAUSAL else there[None, :] & (position == position)[:, None]
        if window is not None:
            seen = seen & (tl.abs(ahead) < window)
        scores = tl.where(seen, scores, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(highest == -float("inf"), 0.0, highest)
        shares, fade = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        total = total * fade + tl.sum(shares, 1)
        if scales_v is not None:
            line = block * s_block + place * s_line
            shares *= tl.load(scales_v + line, mask=there, other=0.0)[None, :]
        if LATENT:
            v_tile = tl.trans(k_tile)
        else:
            v_at = v + block * v_block + place * v_line
            v_tile = tl.load(v_at[:, None] + value[None, :], mask=there[:, None] & (value < V)[None, :], other=0.0)
        sums = tl.dot(shares.to(q.dtype), v_tile.to(q.dtype), sums * fade[:, None], input_precision="ieee")
        top = highest
    return top, total, sums


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, tables, contexts, cu_q, out, tops, totals, norms, sinks, bias, scales_k, scales_v,
    scale, window, longest, B, R, D, V, table_row, q_token, q_head, k_block, k_line, k_head, v_block, v_line, v_head,
    s_block, s_line, SIZE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    CHUNK: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr, LATENT: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """ROWS // HEADS queries of a sequence by HEADS heads of a group; SPLIT: of one chunk, to be merged.

    Without tables the keys are packed rows, and contexts the sequences' borders in them.
    """
    TOKENS: tl.constexpr = ROWS // HEADS
    low, high = tl.program_id(0) * 0, tl.program_id(0) * 0 + B
    while high - low > 1:  # the last sequence whose queries begin at or before this program's
        middle = (low + high) // 2
        mine = tl.load(cu_q + middle).to(tl.int32) // TOKENS + middle <= tl.program_id(0)
        low, high = tl.where(mine, middle, low), tl.where(mine, high, middle)
    begin = tl.load(cu_q + low).to(tl.int32)
    queries = tl.load(cu_q + low + 1).to(tl.int32) - begin
    token = (tl.program_id(0) - begin // TOKENS - low) * TOKENS
    if token >= queries:
        return
    blocks = tl.cdiv(R, HEADS)
    group = tl.program_id(1) // blocks
    r = tl.arange(0, ROWS)
    within = (tl.program_id(1) % blocks) * HEADS + r % HEADS
    row_ok = (r < TOKENS * HEADS) & (token + r // HEADS < queries) & (within < R)
    row, head = (begin + token + r // HEADS).to(tl.int64), group * R + within
    own_k, own_v = k + group * k_head, v + group * v_head
    context = tl.load(contexts + low).to(tl.int32)
    own_table = tables
    if tables is None:
        own_k += context.to(tl.int64) * k_line
        own_v += context.to(tl.int64) * v_line
        context = tl.load(contexts + low + 1).to(tl.int32) - context
    else:
        own_table = tables + low.to(tl.int64) * table_row
    lowest = context - queries + token
    position = lowest + r // HEADS
    highest = tl.minimum(lowest + TOKENS, context)
    since, until = 0, context
    if CAUSAL:
        until = highest
    if window is not None:
        since = tl.maximum(lowest - window + 1, 0) // KEYS * KEYS
        until = tl.minimum(until, highest + window - 1)
    main = tl.arange(0, MAIN)
    q_at = q + row[:, None] * q_token + head[:, None] * q_head
    q_main = tl.load(q_at + main[None, :], mask=row_ok[:, None] & (main < D)[None, :], other=0.0)
    q_rest = q_main
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        q_rest = tl.load(q_at + rest[None, :], mask=row_ok[:, None] & (rest < D)[None, :], other=0.0)
    own_bias = bias
    if bias is not None:
        own_bias = bias + tl.where(row_ok, head, 0) * (2 * longest + 1)
    own_scales_k, own_scales_v = scales_k, scales_v
    if scales_k is not None:
        own_scales_k, own_scales_v = scales_k + group, scales_v + group
    value = tl.arange(0, WIDTH)
    H = tl.num_programs(1) // blocks * R
    at = row * H + head
    if SPLIT:
        chunk = tl.program_id(2)
        chunks = tl.num_programs(2)
        start, stop = tl.maximum(chunk * CHUNK, since), tl.minimum(chunk * CHUNK + CHUNK, until)
        top, total, sums = _chunk(
            q_main, q_rest, own_k, own_v, own_scales_k, own_scales_v, own_table, own_bias, start, stop, position,
            scale, window, longest, D, V, k_block, k_line, v_block, v_line, s_block, s_line,
            SIZE, KEYS, MAIN, REST, WIDTH, CAUSAL, LATENT, LOG2E,
        )  # fmt: skip
        tl.store(tops + at * chunks + chunk, top, mask=row_ok)
        tl.store(totals + at * chunks + chunk, total, mask=row_ok)
        part = out + (at * chunks + chunk)[:, None] * V + value[None, :]
        tl.store(part, sums, mask=row_ok[:, None] & (value < V)[None, :] & (start < stop))
    else:
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        for chunk in range(since // CHUNK, tl.cdiv(until, CHUNK)):
            start, stop = tl.maximum(chunk * CHUNK, since), tl.minimum(chunk * CHUNK + CHUNK, until)
            next_top, next_total, next_sums = _chunk(
                q_main, q_rest, own_k, own_v, own_scales_k, own_scales_v, own_table, own_bias, start, stop, position,
                scale, window, longest, D, V, k_block, k_line, v_block, v_line, s_block, s_line,
                SIZE, KEYS, MAIN, REST, WIDTH, CAUSAL, LATENT, LOG2E,
            )  # fmt: skip
            top, total, sums = _merge(top, total, sums, next_top, next_total, next_sums)
        result, norm = _finish(top, total, sums, sinks, head, row_ok, LOG2E)
        if norms is not None:
            tl.store(norms + at, norm, mask=row_ok)
        out_at = out + at[:, None] * V + value[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=row_ok[:, None] & (value < V)[None, :])


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    parts, tops, totals, sinks, out, H, V, chunks, WIDTH: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """One query's head: the chunks' parts in their order."""
    at = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    value = tl.arange(0, WIDTH)
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, WIDTH], tl.float32)
    for chunk in range(0, chunks):
        next_top = tl.load(tops + at * chunks + chunk)
        seen = (next_top > -float("inf"))[:, None] & (value < V)[None, :]
        next_sums = tl.load(parts + (at * chunks + chunk)[:, None] * V + value[None, :], mask=seen, other=0.0)
        top, total, sums = _merge(top, total, sums, next_top, tl.load(totals + at * chunks + chunk), next_sums)
    result, _ = _finish(top, total, sums, sinks, at % H, at >= 0, LOG2E)
    tl.store(out + at[:, None] * V + value[None, :], result.to(out.dtype.element_ty), mask=(value < V)[None, :])


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
    rows = (q_THd, cache_k, cache_v, block_tables_BM, context_lens_B, cu_q_B1)
    packed = all(t.stride(-1) == 1 or t.shape[-1] <= 1 for t in rows)
    kinds = {cache_k.dtype, cache_v.dtype} - set(FLOATS)
    return runs(q_THd) and packed and kinds <= ({torch.int8} if scales_k is not None else set())


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
    return q_THd.is_cuda


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
    (T, H, D), B = q_THd.shape, len(context_lens_B)
    R = H // cache_k.shape[2]
    tile = attention_tile(-(-T // max(B, 1)) * R, D, q_THd.element_size())
    programs = (T // (tile.rows // min(R, tile.rows)) + B) * cache_k.shape[2] * -(-R // tile.rows)
    chunks = -(-block_tables_BM.shape[1] * cache_k.shape[1] // tile.chunk)
    parts = chunks * T * H * cache_v.shape[3] * 4
    if programs >= PROGRAMS or parts > _PARTS:
        chunks = 1
    return attend(
        q_THd, cache_k, cache_v, block_tables_BM, context_lens_B, cu_q_B1, scale=scale, causal=causal, window=window,
        sinks_H=sinks_H, bias_HR=bias_HR, scales_k=scales_k, scales_v=scales_v, tile=tile, chunks=chunks,
    )  # fmt: skip


def attend(
    q_THd: Tensor, cache_k: Tensor, cache_v: Tensor, tables_BM: Tensor | None, contexts: Tensor, cu_q_B1: Tensor, *,
    scale: float, causal: bool, window: int | None, sinks_H: Tensor | None, bias_HR: Tensor | None,
    scales_k: Tensor | None, scales_v: Tensor | None, tile: AttentionTile, chunks: int, norms_TH: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention with a given tile; `chunks`: 1, or as many as the tables can hold, each with programs of its own.

    Args:
        tables_BM: None = the one page holds packed rows, and `contexts` has their borders.
        norms_TH: float32, filled with the binary logarithms of the softmaxes' sums (of one chunk only).
    """
    (T, H, D), (size, G, V), B = q_THd.shape, cache_v.shape[1:], len(cu_q_B1) - 1
    out_THV = q_THd.new_empty(T, H, V)
    if out_THV.numel() == 0:
        return out_THV
    main, rest = halves(D)
    size, table_row = (1, 0) if tables_BM is None else (size, tables_BM.stride(0))
    width = max(16, triton.next_power_of_2(V))
    heads = min(H // G, tile.rows)
    split = chunks > 1
    parts, tops, totals = (
        torch.empty(T, H, chunks, *shape, dtype=torch.float32, device=q_THd.device) if split else out_THV
        for shape in ((V,), (), ())
    )
    latent = cache_v.data_ptr() == cache_k.data_ptr() and cache_v.stride() == cache_k.stride() and V == main <= D
    grid = (T // (tile.rows // heads) + B, G * triton.cdiv(H // G, heads), chunks)
    attention_kernel[grid](
        q_THd, cache_k, cache_v, tables_BM, contexts, cu_q_B1, parts, tops, totals, norms_TH,
        sinks_H, None if bias_HR is None else bias_HR.contiguous(), scales_k, scales_v,
        scale * LOG2E, window, 0 if bias_HR is None else bias_HR.shape[1] // 2, B, H // G, D, V,
        table_row, *q_THd.stride()[:2], *cache_k.stride()[:3], *cache_v.stride()[:3],
        *((0, 0) if scales_k is None else scales_k.stride()[:2]),
        size, tile.rows, heads, tile.keys, tile.chunk, main, rest, width, split, causal, latent, LOG2E,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split:
        merge_kernel[(T * H,)](parts, tops, totals, sinks_H, out_THV, H, V, chunks, width, LOG2E)
    return out_THV
