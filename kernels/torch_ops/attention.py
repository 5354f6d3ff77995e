"""Attention in batches: equal sequences together, heads of one key/value group folded into query rows.

Training in bfloat16 on a CPU writes short sequences' attention out in batched products with a float32 softmax: that
takes half the time of PyTorch's CPU flash attention, forward and backward, at 256 tokens. All else is SDPA, without
`enable_gqa`, which is an order of magnitude slower on a CPU.

T tokens, B sequences, H query heads, G key/value heads, R = H / G, d head dim, S queries and L keys of a sequence,
P = B·G problems of N = R·S rows.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..cpp import flash
from ..reference.attention import dequantised, distance_bias, nothing, own_keys, visible
from ..reference.precision import wide

CACHED = 1 << 19  # scores to compute at once: 2 MB in float32
EXPLICIT = 1 << 23  # the most scores to write out in one call: 32 MB in float32


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
    """Neighbouring sequences of as many queries and as many keys form a batch."""
    cus = (cu_seqlens_B1, own_keys(cu_seqlens_B1, cu_k_B1))
    if len(q_THd) and len(k_TGd) and sinks_H is None and bias_HR is None and flash.runs(q_THd, k_TGd, v_TGd):
        return flash.attention(q_THd, k_TGd, v_TGd, *cus, scale, causal, window)
    lengths = zip(*([end - start for start, end in itertools.pairwise(cu.tolist())] for cu in cus), strict=True)
    outputs, start, first = [], 0, 0
    for (S, L), run in itertools.groupby(lengths):
        B = len(list(run))
        queries, keys = slice(start, start := start + B * S), slice(first, first := first + B * L)
        if B * S == 0:
            continue
        q, k, v = (
            q_THd[queries].unflatten(0, (B, S)),
            k_TGd[keys].unflatten(0, (B, L)),
            v_TGd[keys].unflatten(0, (B, L)),
        )
        k_at, q_at = (torch.arange(n, L, device=q.device) for n in (0, L - S))
        bias_HSL = None if bias_HR is None else distance_bias(bias_HR, q_at, k_at)
        seen_SL = visible(q_at, k_at, causal, window)
        outputs.append(_attend(q, k, v, seen_SL, scale, sinks_H, bias_HSL).flatten(0, 1))
    return torch.cat(outputs) if outputs else nothing(q_THd, k_TGd, v_TGd)


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
    """All sequences with one query (decode) form one batch, padded to the longest; the others run one by one.

    Of a window nothing is read that has left it.
    """
    out_THd = q_THd.new_zeros(q_THd.shape[0], q_THd.shape[1], cache_v.shape[3])
    starts = cu_q_B1.tolist()
    lengths = context_lens_B.tolist()
    decode: list[int] = []
    prefill: list[int] = []
    for b, (start, end) in enumerate(itertools.pairwise(starts)):
        if end > start and lengths[b]:
            (decode if end - start == 1 else prefill).append(b)
    groups = [[b] for b in prefill] + ([decode] if decode else [])
    for group in groups:
        count = starts[group[0] + 1] - starts[group[0]]
        ends_B1 = context_lens_B[group][:, None].long()
        firsts = [0 if window is None else max(lengths[b] - count - window + 1, 0) for b in group]
        longest = max(lengths[b] - first for b, first in zip(group, firsts, strict=True))
        k_at_BL = torch.tensor(firsts, device=q_THd.device)[:, None] + torch.arange(longest, device=q_THd.device)
        slots_BL = _slots(block_tables_BM[group], torch.minimum(k_at_BL, ends_B1 - 1), cache_k.shape[1])
        q_at_BS = ends_B1 - count + torch.arange(count, device=q_THd.device)
        ahead = k_at_BL[:, None] - q_at_BS[..., None]
        seen_BSL = (ahead <= 0) if causal else (k_at_BL < ends_B1)[:, None].expand_as(ahead)
        if window is not None:
            seen_BSL = seen_BSL & (ahead.abs() < window)
        bias_BHSL = None if bias_HR is None else _biases(bias_HR, ahead)
        rows = torch.tensor([row for b in group for row in range(starts[b], starts[b + 1])], device=q_THd.device)
        k = _rows(cache_k, scales_k, slots_BL).to(q_THd.dtype)
        shared = cache_v.data_ptr() == cache_k.data_ptr()
        v = k[..., : cache_v.shape[-1]] if shared else _rows(cache_v, scales_v, slots_BL).to(q_THd.dtype)
        q = q_THd[rows].unflatten(0, (len(group), count))
        out_THd[rows] = _attend(q, k, v, seen_BSL, scale, sinks_H, bias_BHSL).flatten(0, 1)
    return out_THd


def _slots(tables_BM: Tensor, at_BL: Tensor, block_size: int) -> Tensor:
    """Where positions lie in the cache. Positions past a context were clamped to its last token: stale pages, which
    may hold NaN, are never read."""
    blocks_BL = tables_BM.long().gather(1, at_BL // block_size)
    return blocks_BL * block_size + at_BL % block_size


def _rows(cache: Tensor, scales: Tensor | None, slots_BL: Tensor) -> Tensor:
    """What the cache holds at these slots, [B, L, G, d]."""
    slots = slots_BL.flatten()
    own = None if scales is None else scales.flatten(0, 1).index_select(0, slots)
    return dequantised(cache.flatten(0, 1).index_select(0, slots), own).unflatten(0, slots_BL.shape)


def _biases(bias_HR: Tensor, ahead_BSL: Tensor) -> Tensor:
    """[B, H, S, L]: the bias of each head at each distance."""
    longest = bias_HR.shape[1] // 2
    return bias_HR[:, ahead_BSL.clamp(-longest, longest) + longest].transpose(0, 1)


def _attend(
    q_BSHd: Tensor, k_BLGd: Tensor, v_BLGd: Tensor, seen: Tensor, scale: float,
    sinks_H: Tensor | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of a batch; `seen` is [S, L], or [B, S, L] where contexts differ, `bias` the same by head."""
    B, S, H, _ = q_BSHd.shape
    L, G = k_BLGd.shape[1:3]
    R = H // G
    q = q_BSHd.unflatten(2, (G, R)).permute(0, 2, 3, 1, 4).reshape(B, G, R * S, -1)
    k, v = k_BLGd.transpose(1, 2), v_BLGd.transpose(1, 2)
    mask = torch.zeros(seen.shape, dtype=wide(q[:0]).dtype, device=q.device).masked_fill_(~seen, float("-inf"))
    if sinks_H is not None or bias is not None:
        scores = mask.unsqueeze(-3) if bias is None else mask.unsqueeze(-3) + bias
        scores = scores.expand(*scores.shape[:-3], H, S, L)
        if sinks_H is not None:  # one more key, of zeros, whose score is the sink
            sink = sinks_H[:, None, None].expand(*scores.shape[:-1], 1).to(scores.dtype)
            scores = torch.cat((scores, sink), -1)
            k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        mask = scores.unflatten(-3, (G, R)).flatten(-3, -2)
        mask = mask if q.device.type == "cpu" else mask.to(q.dtype)  # a GPU's fast kernels take no other
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return o.unflatten(2, (R, S)).permute(0, 3, 1, 2, 4).reshape(B, S, H, -1)
    if R > 1:
        mask = torch.cat([mask] * R, dim=-2)
    if seen.dim() == 2 and q.device.type == "cpu" and q.element_size() == 2 and B * H * S * L <= EXPLICIT:
        o = _Explicit.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, scale).unflatten(0, (B, G))
    else:
        mask = (mask[:, None] if mask.dim() == 3 else mask).to(q.dtype)
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return o.unflatten(2, (R, S)).permute(0, 3, 1, 2, 4).reshape(B, S, H, -1)


class _Explicit(Function):
    """Scores and softmax in float32, the other products in the operands' dtype; probabilities are kept for backward.

    A few heads at a time, so that their scores stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, q_PNd: Tensor, k_PLd: Tensor, v_PLd: Tensor, bias: Tensor, scale: float) -> Tensor:
        p_PNL, o_PNd = (
            q_PNd.new_empty(*q_PNd.shape[:2], k_PLd.shape[1]),
            q_PNd.new_empty(*q_PNd.shape[:2], v_PLd.shape[2]),
        )
        for some in _few(p_PNL):
            scores = torch.baddbmm(bias, wide(q_PNd[some]), wide(k_PLd[some]).mT, alpha=scale)
            p_PNL[some] = torch.softmax(scores, -1, out=scores)
            torch.bmm(p_PNL[some], v_PLd[some], out=o_PNd[some])
        ctx.save_for_backward(q_PNd, k_PLd, v_PLd, p_PNL, o_PNd)
        ctx.scale = scale
        return o_PNd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PNd: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, p, o = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for some in _few(p):
            grad = grad_PNd[some]
            delta = (wide(grad) * o[some]).sum(-1, keepdim=True).to(p.dtype)
            grad_scores = torch.baddbmm(delta, grad, v[some].mT, beta=-1).mul_(p[some])
            torch.bmm(p[some].mT, grad, out=grad_v[some])
            torch.bmm(grad_scores, k[some], out=grad_q[some])
            torch.bmm(grad_scores.mT, q[some], out=grad_k[some])
        return grad_q.mul_(ctx.scale), grad_k.mul_(ctx.scale), grad_v, None, None


def _few(p_PNL: Tensor) -> Iterator[slice]:
    """Slices of P whose scores are few enough."""
    count = max(CACHED // max(p_PNL[0].numel(), 1), 1) if len(p_PNL) else 1
    return (slice(first, first + count) for first in range(0, len(p_PNL), count))
