"""A router's decision in one pass over its rows, and its gradient in another.

Ranks are compared as whole numbers, so that no order of operations can matter; sigmoids are the library's, whose bits
the reference has. T tokens, E experts, K choices, G groups of e neighbouring experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..configs import MOST_EXPERTS, gate_rows
from ..reference.gates import sigmoid
from .probe import runs


@triton.jit
def _keys(rank):
    """int32 in the order of the floats: NaN above all, both zeros one."""
    bits = (rank + 0.0).to(tl.int32, bitcast=True)
    return tl.where(rank == rank, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _highest(keys, at):
    """The place of each row's highest key, the first of several."""
    return tl.min(tl.where(keys == tl.max(keys, 1)[:, None], at[None, :], at.shape[0] - 1), 1)


@triton.jit
def _within(keys, rank, e, size, groups, top_groups, best, BINS: tl.constexpr, NEVER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys outside of a row's best groups as of -infinity. A group's score is the sum of its `best` highest ranks."""
    g = tl.arange(0, BINS)
    scores = tl.full([keys.shape[0], BINS], -float("inf"), tl.float32)
    for group in range(0, groups):
        own = tl.where((e // size == group)[None, :], keys, NEVER)
        score = tl.zeros([keys.shape[0]], tl.float32)
        for _ in range(0, best):
            taken = e[None, :] == _highest(own, e)[:, None]
            score += tl.sum(tl.where(taken, rank, 0.0), 1)
            own = tl.where(taken, NEVER, own)
        scores = tl.where((g == group)[None, :], score[:, None], scores)
    left = tl.where((g < groups)[None, :], _keys(scores), NEVER)
    inside = tl.zeros(keys.shape, tl.int32)
    for _ in range(0, top_groups):
        next_best = _highest(left, g)
        left = tl.where(g[None, :] == next_best[:, None], NEVER, left)
        inside |= ((e // size)[None, :] == next_best[:, None]).to(tl.int32)
    return tl.where((inside > 0) | (keys == NEVER), keys, NEVER + 0x7FFFFF)


@triton.jit
def _shares(x, ok):
    """A row's softmax where `ok`; NaN where anything is NaN."""
    x = tl.where(ok, x, -float("inf"))
    powers = tl.where(ok, tl.exp(x - tl.max(x, 1)[:, None]), 0.0)
    return tl.div_rn(powers, tl.broadcast_to(tl.sum(powers, 1)[:, None], powers.shape))


@triton.jit
def _log_sigmoid(x):
    return tl.where(x < 0, x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def gates_kernel(  # type: ignore[no-untyped-def]
    logits, sigmoids, bias, given, ids, weights, T, E, K, groups, top_groups, best, scale,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, BINS: tl.constexpr, SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr, NEVER: tl.constexpr,
):  # fmt: skip
    """ROWS tokens: their choices, unless they are given, and the weights of these."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, row_ok = t.to(tl.int64) * E, t < T
    e, k = tl.arange(0, WIDTH), tl.arange(0, CHOICES)
    ok = row_ok[:, None] & (e < E)[None, :]
    at, there = t.to(tl.int64)[:, None] * K + k[None, :], row_ok[:, None] & (k < K)[None, :]
    if given is None:
        ranked = logits if sigmoids is None else sigmoids
        rank = tl.load(ranked + row[:, None] + e[None, :], mask=ok, other=0.0)
        if bias is not None:
            rank += tl.load(bias + e, mask=e < E, other=0.0)[None, :]
        keys = tl.where((e < E)[None, :], _keys(rank), NEVER)
        if BINS > 1:
            keys = _within(keys, rank, e, E // groups, groups, top_groups, best, BINS, NEVER)
        chosen = tl.zeros([ROWS, CHOICES], tl.int32)
        for choice in range(0, K):
            expert = _highest(keys, e)
            chosen = tl.where((k == choice)[None, :], expert[:, None], chosen)
            keys = tl.where(e[None, :] == expert[:, None], NEVER, keys)
        tl.store(ids + at, chosen.to(tl.int64), mask=there)
    else:
        chosen = tl.load(given + at, mask=there, other=0).to(tl.int32)
    if SCORE == "softmax":
        x = tl.load(logits + row[:, None] + e[None, :], mask=ok, other=0.0)
        top = tl.max(tl.where(ok, x, -float("inf")), 1)
        total = tl.sum(tl.where(ok, tl.exp(x - top[:, None]), 0.0), 1)
        x = tl.load(logits + row[:, None] + chosen, mask=there, other=0.0)
        weight = tl.where(there, tl.div_rn(tl.exp(x - top[:, None]), tl.broadcast_to(total[:, None], x.shape)), 0.0)
        if RENORMALIZE:
            weight = tl.div_rn(weight, tl.broadcast_to(tl.sum(weight, 1)[:, None], weight.shape))
    elif SCORE == "sigmoid" and not RENORMALIZE:
        weight = tl.load(sigmoids + row[:, None] + chosen, mask=there, other=0.0)
    else:
        x = tl.load(logits + row[:, None] + chosen, mask=there, other=0.0)
        weight = _shares(_log_sigmoid(x) if SCORE == "sigmoid" else x, there)
    tl.store(weights + at, weight * scale, mask=there)


@triton.jit
def gates_backward_kernel(  # type: ignore[no-untyped-def]
    grad, logits, ids, out, T, E, K, scale, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """The gradients of ROWS tokens' logits: what each choice gives to its own, and of a softmax over all to all."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, row_ok = t.to(tl.int64) * E, t < T
    e, k = tl.arange(0, WIDTH), tl.arange(0, CHOICES)
    ok = row_ok[:, None] & (e < E)[None, :]
    at, there = t.to(tl.int64)[:, None] * K + k[None, :], row_ok[:, None] & (k < K)[None, :]
    chosen = tl.load(ids + at, mask=there, other=-1).to(tl.int32)
    g = tl.load(grad + at, mask=there, other=0.0) * scale
    x = tl.load(logits + row[:, None] + chosen, mask=there, other=0.0)
    back = tl.zeros([ROWS, WIDTH], tl.float32)
    if SCORE == "softmax" and not RENORMALIZE:
        all_ = tl.load(logits + row[:, None] + e[None, :], mask=ok, other=0.0)
        top = tl.max(tl.where(ok, all_, -float("inf")), 1)
        powers = tl.where(ok, tl.exp(all_ - top[:, None]), 0.0)
        total = tl.sum(powers, 1)[:, None]
        own = tl.where(there, g * (tl.exp(x - top[:, None]) / total), 0.0)
        back -= (powers / total) * tl.sum(own, 1)[:, None]
    elif SCORE == "sigmoid" and not RENORMALIZE:
        share = tl.sigmoid(x)
        own = g * share * (1.0 - share)
    else:
        weight = _shares(_log_sigmoid(x) if SCORE == "sigmoid" else x, there)
        own = weight * (g - tl.sum(weight * g, 1)[:, None])
        if SCORE == "sigmoid":
            own *= tl.sigmoid(-x)
    for choice in range(0, K):
        mine = (k == choice)[None, :]
        expert = tl.sum(tl.where(mine, chosen, 0), 1)
        part = tl.sum(tl.where(mine, own, 0.0), 1)
        back += tl.where(e[None, :] == expert[:, None], part[:, None], 0.0)
    tl.store(out + row[:, None] + e[None, :], back, mask=ok)


NEVER = -(1 << 31)  # below all keys; that of -infinity is 0x7FFFFF more
SCORES = ("softmax", "sigmoid", "chosen")


def top_k_gates_pays(
    logits_TE: Tensor, top_k: int, *, ids_TK: Tensor | None = None, score: str = "softmax",
    bias_E: Tensor | None = None, groups: int = 1, top_groups: int = 1, best: int = 1, renormalize: bool = False,
    scale: float = 1.0,
) -> bool:  # fmt: skip
    return logits_TE.is_cuda


def top_k_gates_fits(
    logits_TE: Tensor, top_k: int, *, ids_TK: Tensor | None = None, score: str = "softmax",
    bias_E: Tensor | None = None, groups: int = 1, top_groups: int = 1, best: int = 1, renormalize: bool = False,
    scale: float = 1.0,
) -> bool:  # fmt: skip
    one_dtype = logits_TE.dtype == torch.float32 and (bias_E is None or bias_E.dtype == torch.float32)
    return runs(logits_TE) and one_dtype and logits_TE.shape[1] <= MOST_EXPERTS


def top_k_gates(
    logits_TE: Tensor, top_k: int, *, ids_TK: Tensor | None = None, score: str = "softmax",
    bias_E: Tensor | None = None, groups: int = 1, top_groups: int = 1, best: int = 1, renormalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    limits = (1, 1, 1) if top_groups == groups else (groups, top_groups, best)
    return _TopKGates.apply(logits_TE, top_k, ids_TK, score, bias_E, limits, renormalize, scale)


class _TopKGates(Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, top_k: int, given_TK: Tensor | None, score: str, bias_E: Tensor | None,
        limits: tuple[int, int, int], renormalize: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logits = logits_TE.contiguous()
        T, E = logits.shape
        ids_TK = (
            torch.empty(T, top_k, dtype=torch.int64, device=logits.device) if given_TK is None else given_TK.clone()
        )
        weights_TK = logits.new_empty(T, top_k)
        if T:
            width, choices, rows, warps = _sizes(E, top_k)
            gates_kernel[(triton.cdiv(T, rows),)](
                logits, sigmoid(logits).contiguous() if score == "sigmoid" else None,
                None if bias_E is None else bias_E.contiguous(),
                None if given_TK is None else ids_TK.contiguous(), ids_TK, weights_TK, T, E, top_k, *limits, scale,
                rows, width, choices, triton.next_power_of_2(limits[0]), score, renormalize, NEVER, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(logits, ids_TK)
        ctx.rule = score, renormalize, scale
        ctx.mark_non_differentiable(ids_TK)
        return ids_TK, weights_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad_TK: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids_TK = ctx.saved_tensors
        score, renormalize, scale = ctx.rule
        grad_TE = torch.empty_like(logits)
        T, E = logits.shape
        if T:
            top_k = ids_TK.shape[1]
            width, choices, rows, warps = _sizes(E, top_k)
            gates_backward_kernel[(triton.cdiv(T, rows),)](
                grad_TK.contiguous(), logits, ids_TK.contiguous(), grad_TE, T, E, top_k, scale,
                rows, width, choices, score, renormalize, num_warps=warps,
            )  # fmt: skip
        return grad_TE, *(None,) * 7


def _sizes(experts: int, top_k: int) -> tuple[int, int, int, int]:
    """Lanes of the experts and of the choices, rows and warps of a program."""
    width = max(16, triton.next_power_of_2(experts))
    return width, triton.next_power_of_2(top_k), *gate_rows(width)
