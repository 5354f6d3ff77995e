"""Attention of packed sequences for training and prompts: the kernel of pages on rows, and its gradients.

For the backward pass are kept q, k, v, the result and the logarithm of each softmax's sum. Keys' gradients are summed
by the program that has the keys, queries' by the one that has the queries: no atomics, every sum in one order.

T tokens, B sequences, H query heads, G key/value heads, R = H / G, D width, V that of the values.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..configs import MOST_BACK, attention_back_tile, attention_tile, halves
from .attention import LOG2E, attend
from .probe import runs


@triton.jit
def deltas_kernel(out, grad, deltas, V, grad_token, grad_head, H, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ out · grad of one head of one token."""
    at, value = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    o = tl.load(out + at * V + value, mask=value < V, other=0.0).to(tl.float32)
    source = grad + at // H * grad_token + at % H * grad_head + value
    g = tl.load(source, mask=value < V, other=0.0).to(tl.float32)
    tl.store(deltas + at, tl.sum(o * g, 0))


@triton.jit
def _place(borders, B, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(A sequence, and the first of its at most SIZE rows that are this program's); past its end if there are none."""
    low, high = tl.program_id(0) * 0, tl.program_id(0) * 0 + B
    while high - low > 1:
        middle = (low + high) // 2
        mine = tl.load(borders + middle).to(tl.int32) // SIZE + middle <= tl.program_id(0)
        low, high = tl.where(mine, middle, low), tl.where(mine, high, middle)
    return low, (tl.program_id(0) - tl.load(borders + low).to(tl.int32) // SIZE - low) * SIZE


@triton.jit
def _pairs(  # type: ignore[no-untyped-def]
    q, q_rest, k, k_rest, v, grad, norm, delta, bias, row_ok, there, ahead, scale, window, longest,
    REST: tl.constexpr, CAUSAL: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """(Probabilities, gradients of the scores) of some queries and keys [rows, keys]."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if REST > 0:
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
    scores *= scale * LOG2E
    if bias is not None:
        away = tl.minimum(tl.maximum(ahead, -longest), longest) + longest
        scores += tl.load(bias[:, None] + away).to(tl.float32) * LOG2E
    seen = row_ok[:, None] & there[None, :]
    if CAUSAL:
        seen = seen & (ahead <= 0)
    if window is not None:
        seen = seen & (tl.abs(ahead) < window)
    share = tl.where(seen, tl.exp2(scores - norm[:, None]), 0.0)
    back = tl.dot(grad, tl.trans(v), input_precision="ieee")
    return share, share * (back - delta[:, None])


@triton.jit
def query_grad_kernel(  # type: ignore[no-untyped-def]
    q, k, v, grad, norms, deltas, cu_q, cu_k, bias, out, scale, window, longest, B, R, D, V,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, ROWS: tl.constexpr, HEADS: tl.constexpr,
    KEYS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    """The gradients of ROWS // HEADS queries of a sequence by HEADS heads of a group: over its keys, ascending."""
    TOKENS: tl.constexpr = ROWS // HEADS
    b, token = _place(cu_q, B, TOKENS)
    begin, first = tl.load(cu_q + b).to(tl.int32), tl.load(cu_k + b).to(tl.int32)
    queries, context = tl.load(cu_q + b + 1).to(tl.int32) - begin, tl.load(cu_k + b + 1).to(tl.int32) - first
    if token >= queries:
        return
    blocks = tl.cdiv(R, HEADS)
    group, r = tl.program_id(1) // blocks, tl.arange(0, ROWS)
    within = (tl.program_id(1) % blocks) * HEADS + r % HEADS
    row_ok = (r < TOKENS * HEADS) & (token + r // HEADS < queries) & (within < R)
    row, head = (begin + token + r // HEADS).to(tl.int64), group * R + within
    main, rest, value = tl.arange(0, MAIN), MAIN + tl.arange(0, max(REST, 1)), tl.arange(0, WIDTH)
    q_at = q + row[:, None] * q_token + head[:, None] * q_head
    q_main = tl.load(q_at + main[None, :], mask=row_ok[:, None] & (main < D)[None, :], other=0.0)
    q_rest = q_main
    if REST > 0:
        q_rest = tl.load(q_at + rest[None, :], mask=row_ok[:, None] & (rest < D)[None, :], other=0.0)
    grad_at = grad + row[:, None] * grad_token + head[:, None] * grad_head + value[None, :]
    g = tl.load(grad_at, mask=row_ok[:, None] & (value < V)[None, :], other=0.0)
    H = tl.num_programs(1) // blocks * R
    norm = tl.load(norms + row * H + head, mask=row_ok, other=float("inf"))
    delta = tl.load(deltas + row * H + head, mask=row_ok, other=0.0)
    own_bias = bias
    if bias is not None:
        own_bias = bias + tl.where(row_ok, head, 0) * (2 * longest + 1)
    lowest = context - queries + token
    position = lowest + r // HEADS
    since, until = 0, context
    if CAUSAL:
        until = tl.minimum(lowest + TOKENS, context)
    if window is not None:
        since = tl.maximum(lowest - window + 1, 0) // KEYS * KEYS
        until = tl.minimum(until, lowest + TOKENS + window - 1)
    total = tl.zeros([ROWS, MAIN], tl.float32)
    total_rest = tl.zeros([ROWS, max(REST, 1)], tl.float32)
    for start in range(since, until, KEYS):
        at = start + tl.arange(0, KEYS)
        there, key = at < context, (first + at).to(tl.int64)
        k_at = k + key[:, None] * k_token + group * k_head
        k_main = tl.load(k_at + main[None, :], mask=there[:, None] & (main < D)[None, :], other=0.0)
        k_rest = k_main
        if REST > 0:
            k_rest = tl.load(k_at + rest[None, :], mask=there[:, None] & (rest < D)[None, :], other=0.0)
        v_at = v + key[:, None] * v_token + group * v_head + value[None, :]
        v_tile = tl.load(v_at, mask=there[:, None] & (value < V)[None, :], other=0.0)
        _, back = _pairs(
            q_main, q_rest, k_main, k_rest, v_tile, g, norm, delta, own_bias, row_ok, there,
            at[None, :] - position[:, None], scale, window, longest, REST, CAUSAL, LOG2E,
        )  # fmt: skip
        back = back.to(q_main.dtype)
        total = tl.dot(back, k_main, total, input_precision="ieee")
        if REST > 0:
            total_rest = tl.dot(back, k_rest, total_rest, input_precision="ieee")
    out_at = out + (row * H + head)[:, None] * D
    tl.store(
        out_at + main[None, :], (total * scale).to(out.dtype.element_ty), mask=row_ok[:, None] & (main < D)[None, :]
    )
    if REST > 0:
        tl.store(
            out_at + rest[None, :],
            (total_rest * scale).to(out.dtype.element_ty),
            mask=row_ok[:, None] & (rest < D)[None, :],
        )


@triton.jit
def key_grad_kernel(  # type: ignore[no-untyped-def]
    q, k, v, grad, norms, deltas, cu_q, cu_k, bias, out_k, out_v, scale, window, longest, B, R, D, V,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, ROWS: tl.constexpr, HEADS: tl.constexpr,
    KEYS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    """The gradients of KEYS keys and values of a group: over its heads and their queries, ascending."""
    TOKENS: tl.constexpr = ROWS // HEADS
    b, start = _place(cu_k, B, KEYS)
    begin, first = tl.load(cu_q + b).to(tl.int32), tl.load(cu_k + b).to(tl.int32)
    queries, context = tl.load(cu_q + b + 1).to(tl.int32) - begin, tl.load(cu_k + b + 1).to(tl.int32) - first
    if start >= context:
        return
    group, G, r = tl.program_id(1), tl.num_programs(1), tl.arange(0, ROWS)
    main, rest, value = tl.arange(0, MAIN), MAIN + tl.arange(0, max(REST, 1)), tl.arange(0, WIDTH)
    at = start + tl.arange(0, KEYS)
    there, key = at < context, (first + at).to(tl.int64)
    k_at = k + key[:, None] * k_token + group * k_head
    k_main = tl.load(k_at + main[None, :], mask=there[:, None] & (main < D)[None, :], other=0.0)
    k_rest = k_main
    if REST > 0:
        k_rest = tl.load(k_at + rest[None, :], mask=there[:, None] & (rest < D)[None, :], other=0.0)
    v_at = v + key[:, None] * v_token + group * v_head + value[None, :]
    v_tile = tl.load(v_at, mask=there[:, None] & (value < V)[None, :], other=0.0)
    past = context - queries  # keys before the first query
    since, until = 0, queries
    if CAUSAL:
        since = tl.maximum(start - past, 0) // TOKENS * TOKENS
    if window is not None:
        if not CAUSAL:
            since = tl.maximum(start - past - window + 1, 0) // TOKENS * TOKENS
        until = tl.minimum(until, start + KEYS - past + window - 1)
    total_k = tl.zeros([KEYS, MAIN], tl.float32)
    total_rest = tl.zeros([KEYS, max(REST, 1)], tl.float32)
    total_v = tl.zeros([KEYS, WIDTH], tl.float32)
    for block in range(0, R, HEADS):
        for token in range(since, until, TOKENS):
            within = block + r % HEADS
            row_ok = (r < TOKENS * HEADS) & (token + r // HEADS < queries) & (within < R)
            row, head = (begin + token + r // HEADS).to(tl.int64), group * R + within
            q_at = q + row[:, None] * q_token + head[:, None] * q_head
            q_main = tl.load(q_at + main[None, :], mask=row_ok[:, None] & (main < D)[None, :], other=0.0)
            q_rest = q_main
            if REST > 0:
                q_rest = tl.load(q_at + rest[None, :], mask=row_ok[:, None] & (rest < D)[None, :], other=0.0)
            grad_at = grad + row[:, None] * grad_token + head[:, None] * grad_head + value[None, :]
            g = tl.load(grad_at, mask=row_ok[:, None] & (value < V)[None, :], other=0.0)
            norm = tl.load(norms + row * (G * R) + head, mask=row_ok, other=float("inf"))
            delta = tl.load(deltas + row * (G * R) + head, mask=row_ok, other=0.0)
            own_bias = bias
            if bias is not None:
                own_bias = bias + tl.where(row_ok, head, 0) * (2 * longest + 1)
            share, back = _pairs(
                q_main, q_rest, k_main, k_rest, v_tile, g, norm, delta, own_bias, row_ok, there,
                at[None, :] - (past + token + r // HEADS)[:, None], scale, window, longest, REST, CAUSAL, LOG2E,
            )  # fmt: skip
            total_v = tl.dot(tl.trans(share.to(g.dtype)), g, total_v, input_precision="ieee")
            turned = tl.trans(back.to(q_main.dtype))
            total_k = tl.dot(turned, q_main, total_k, input_precision="ieee")
            if REST > 0:
                total_rest = tl.dot(turned, q_rest, total_rest, input_precision="ieee")
    line = key * G + group
    k_out, v_out = out_k + line[:, None] * D, out_v + line[:, None] * V + value[None, :]
    tl.store(
        k_out + main[None, :], (total_k * scale).to(out_k.dtype.element_ty), mask=there[:, None] & (main < D)[None, :]
    )
    if REST > 0:
        tl.store(
            k_out + rest[None, :],
            (total_rest * scale).to(out_k.dtype.element_ty),
            mask=there[:, None] & (rest < D)[None, :],
        )
    tl.store(v_out, total_v.to(out_v.dtype.element_ty), mask=there[:, None] & (value < V)[None, :])


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
    """A bias has no gradient here, and very wide heads have none."""
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in (q_THd, k_TGd, v_TGd))
    learned = torch.is_grad_enabled() and bias_HR is not None and bias_HR.requires_grad
    narrow = max(q_THd.shape[2], v_TGd.shape[2]) <= MOST_BACK
    one_dtype = q_THd.dtype == k_TGd.dtype == v_TGd.dtype
    return runs(q_THd) and one_dtype and not learned and (narrow or not grads)


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
    return q_THd.is_cuda


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
    cu_k_B1 = cu_seqlens_B1 if cu_k_B1 is None else cu_k_B1
    return _Varlen.apply(q_THd, k_TGd, v_TGd, sinks_H, bias_HR, cu_seqlens_B1, cu_k_B1, scale, causal, window)


class _Varlen(Function):
    @staticmethod
    def forward(
        ctx: Any, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, sinks_H: Tensor | None, bias_HR: Tensor | None,
        cu_q_B1: Tensor, cu_k_B1: Tensor, scale: float, causal: bool, window: int | None,
    ) -> Tensor:  # fmt: skip
        q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q_THd, k_TGd, v_TGd))
        bias = None if bias_HR is None else bias_HR.contiguous()
        T, H, D = q.shape
        norms_TH = torch.empty(T, H, dtype=torch.float32, device=q.device)
        tile = attention_tile(-(-T // max(len(cu_q_B1) - 1, 1)) * (H // k.shape[1]), D, q.element_size())
        out_THV = attend(
            q, k[None], v[None], None, cu_k_B1, cu_q_B1, scale=scale, causal=causal, window=window, sinks_H=sinks_H,
            bias_HR=bias, scales_k=None, scales_v=None, tile=tile, chunks=1, norms_TH=norms_TH,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, sinks_H, bias, cu_q_B1, cu_k_B1, out_THV, norms_TH)
        ctx.rule = scale, causal, window
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, bias, cu_q_B1, cu_k_B1, out_THV, norms_TH = ctx.saved_tensors
        grad = grad_THV if grad_THV.stride(2) == 1 else grad_THV.contiguous()
        (T, H, V), deltas_TH = out_THV.shape, torch.empty_like(norms_TH)
        if out_THV.numel():
            width = triton.next_power_of_2(V)
            deltas_kernel[(T * H,)](out_THV, grad, deltas_TH, V, *grad.stride()[:2], H, width)
        grads = _gradients(q, k, v, grad, norms_TH, deltas_TH, cu_q_B1, cu_k_B1, bias, *ctx.rule)
        grad_sinks = None
        if sinks_H is not None and ctx.needs_input_grad[3]:
            shares_TH = torch.exp2(sinks_H.float() * LOG2E - norms_TH)
            grad_sinks = -(shares_TH * deltas_TH).sum(0).to(sinks_H.dtype)
        return *grads, grad_sinks, *(None,) * 6


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, norms_TH: Tensor, deltas_TH: Tensor, cu_q_B1: Tensor,
    cu_k_B1: Tensor, bias: Tensor | None, scale: float, causal: bool, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (T, H, D), (L, G, V), B = q.shape, v.shape, len(cu_q_B1) - 1
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    R, tile, (main, rest) = H // G, attention_back_tile(D, q.element_size()), halves(D)
    heads = min(R, tile.rows)
    operands = (q, k, v, grad, norms_TH, deltas_TH, cu_q_B1, cu_k_B1, bias)
    numbers = (
        scale, window, 0 if bias is None else bias.shape[1] // 2, B, R, D, V,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2],
        tile.rows, heads, tile.keys, main, rest, max(16, triton.next_power_of_2(V)), causal, LOG2E,
    )  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if grad_q.numel():
        grid = (T // (tile.rows // heads) + B, G * triton.cdiv(R, heads))
        query_grad_kernel[grid](*operands, grad_q, *numbers, **options)
    if grad_k.numel():
        key_grad_kernel[(L // tile.keys + B, G)](*operands, grad_k, grad_v, *numbers, **options)
    return grad_q, grad_k, grad_v
