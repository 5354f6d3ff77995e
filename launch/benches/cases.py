"""Every operation at the shapes that matter, with the bytes and FLOPs that it needs at least.

T rows, D width, F output width, H query heads, G key/value heads, d head dim, E experts, V vocabulary, N kept rows.
Weights and pages come in several copies, of which each call takes the next: a model's layers do not find theirs in the
cache either. Rows are small and warm.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from .case import Arguments, Case
from .maker import Maker
from .noted import noted_cases

MOST = 1 << 28  # bytes of pages that a case may take
ROWS = (1, 16, 256, 2048)
D, F, VOCABULARY = 2048, 4096, 32_000
E, HIDDEN, K = 32, 768, 4
H, G, HEAD = 32, 4, 128
PAGE = 16  # tokens
CONTEXTS, BATCHES, PROMPTS = (512, 2048, 8192), (1, 8, 64), (512, 2048)
ROWWISE = {"rms_norm": (2, 4), "add_rms_norm": (4, 5), "swiglu": (1.5, 4), "pointwise": (2, 4)}  # moved, FLOPs
QUANTIZED: Mapping[str, Mapping[str, Any]] = {
    "8 bits": {}, "8 bits of rows too": {"rows": "int8"}, "4 bits": {"bits": 4}, "e4m3": {"kind": "float"},
}  # fmt: skip
SCALE = {"scale": HEAD**-0.5}


def cases(op: str, maker: Maker) -> list[Case]:
    """The cases of an operation; none where nobody has written any."""
    return list(CASES[op](maker)) if op in CASES else []


def _linear(m: Maker, what: str, columns: int, rows: tuple[int, ...]) -> Iterator[Case]:
    for T in rows:

        def make(T: int = T) -> Arguments:
            x, ws = m.rows(T, D), m.weights(columns, D)
            return [(x, w) for w in ws]

        size = 2 * (columns * D + T * (D + columns))
        yield Case(op="linear", shape=f"{what} {T} x {D} -> {columns}", size=size, flops=2 * T * D * columns, make=make)


def _all_linear(m: Maker) -> Iterator[Case]:
    yield from _linear(m, "linear", F, ROWS)
    yield from _linear(m, "head", VOCABULARY, ROWS[:3])


def _head_gemm(m: Maker) -> Iterator[Case]:
    for T in (1, 16, 256):

        def make(T: int = T) -> Arguments:
            x, ws = m.rows(T, 16, 128), m.weights(16, 128, 512)
            return [(x, w) for w in ws]

        size, flops = 2 * 16 * (128 * 512 + T * 640), 2 * T * 16 * 128 * 512
        yield Case(op="head_gemm", shape=f"{T} x 16 heads x 128 -> 512", size=size, flops=flops, make=make)


def _grouped_gemm(m: Maker) -> Iterator[Case]:
    for T in ROWS:
        counts = [torch.bincount(ids.flatten(), minlength=E) for ids, _ in _draws(m, T)]

        def make(counts: Sequence[Tensor] = counts, rows: int = T * K) -> Arguments:
            x, ws = m.rows(rows, D), m.weights(E, HIDDEN, D)
            return [(x, ws[i % len(ws)].mT, of_E.cumsum(0).int()) for i, of_E in enumerate(counts)]

        met = sum(int((of_E > 0).sum()) for of_E in counts) / len(counts)
        size, flops = 2 * (met * D * HIDDEN + T * K * (D + HIDDEN)), 2 * T * K * D * HIDDEN
        yield Case(op="grouped_gemm", shape=f"{T * K} rows, {E} x {D} -> {HIDDEN}", size=size, flops=flops, make=make)


def _moe_mlp(m: Maker) -> Iterator[Case]:
    for T in ROWS[:3]:
        draws = _draws(m, T)

        def make(T: int = T, draws: Sequence[tuple[Tensor, Tensor]] = draws) -> Arguments:
            x, ins, outs = m.rows(T, D), m.weights(E, 2 * HIDDEN, D), m.weights(E, HIDDEN, D)
            n = min(len(ins), len(outs))
            return [(x, *draw, None, ins[i % n], outs[i % n]) for i, draw in enumerate(draws)]

        size = 2 * (3 * D * HIDDEN * _met(draws) + 2 * T * D)
        shape = f"{T} rows, {E} experts top-{K}, {D} x {HIDDEN}"
        yield Case(op="moe_mlp", shape=shape, size=size, flops=6 * T * K * D * HIDDEN, make=make)


def _draws(m: Maker, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Routings that calls go round in: few rows meet few experts, and the next call's are to be others."""
    return [m.routing(tokens, E, K) for _ in range(16)]


def _met(draws: Sequence[tuple[Tensor, Tensor]]) -> float:
    """How many experts a routing meets in the mean."""
    return sum(len(ids.unique()) for ids, _ in draws) / len(draws)


def _quantized_linear(m: Maker) -> Iterator[Case]:
    shapes = [(how, "", F, T) for how in QUANTIZED for T in ROWS[:3]] + [("8 bits", "head ", VOCABULARY, 1)]
    for how, what, columns, T in shapes:

        def make(T: int = T, how: str = how, columns: int = columns) -> Arguments:
            x, w = m.rows(T, D), _quantized(m, how, columns, D)
            return [(x, w) for w in _copies(m, w)]

        size = columns * D * _bits(how) // 8 + 2 * T * (D + columns)
        shape = f"{what}{how}, {T} x {D} -> {columns}"
        yield Case(op="quantized_linear", shape=shape, size=size, flops=2 * T * D * columns, make=make)


def _quantized_moe_mlp(m: Maker) -> Iterator[Case]:
    for how in QUANTIZED:
        for T in ROWS[:3]:
            draws = _draws(m, T)

            def make(T: int = T, how: str = how, draws: Sequence[tuple[Tensor, Tensor]] = draws) -> Arguments:
                x = m.rows(T, D)
                ins = _copies(m, _quantized(m, how, 2 * HIDDEN, D, E))
                outs = _copies(m, _quantized(m, how, D, HIDDEN, E))
                n = min(len(ins), len(outs))
                return [(x, *draw, None, ins[i % n], outs[i % n]) for i, draw in enumerate(draws)]

            size = 3 * D * HIDDEN * _met(draws) * _bits(how) / 8 + 4 * T * D
            shape = f"{how}, {T} rows, {E} experts top-{K}, {D} x {HIDDEN}"
            yield Case(op="quantized_moe_mlp", shape=shape, size=size, flops=6 * T * K * D * HIDDEN, make=make)


def _bits(how: str) -> int:
    return QUANTIZED[how].get("bits", 8)


def _quantized(m: Maker, how: str, columns: int, depth: int, stack: int = 0) -> kernels.QuantizedWeight:
    """A weight of few bits, or a stack of the same one."""
    one = kernels.quantize_weight(0.02 * m.rows(columns, depth), **QUANTIZED[how])
    if not stack:
        return one
    return replace(one, q=one.q.repeat(stack, 1, 1), scale=one.scale.repeat(stack, *[1] * one.scale.ndim))


def _copies(m: Maker, w: kernels.QuantizedWeight) -> list[kernels.QuantizedWeight]:
    """As many as are cold together."""
    return [replace(w, q=m.copy(w.q)) for _ in range(min(m.cold // w.q.numel() + 1, 16))]


def _routing(op: str, m: Maker) -> Iterator[Case]:
    for T in (16, 2048):
        ids, weights = m.routing(T, E, K)
        kept = torch.ones_like(ids, dtype=torch.bool)
        order, slot, _ = kernels.sort_by_expert(ids, kept, E)

        def make(T: int = T, ids: Tensor = ids, kept: Tensor = kept, weights: Tensor = weights,
                 order: Tensor = order, slot: Tensor = slot) -> Arguments:  # fmt: skip
            if op == "sort_by_expert":
                return [(ids, kept, E)]
            if op == "permute":
                x = m.rows(T, D)
                return [(x, order, slot)]
            y = m.rows(T * K, D)
            return [(y, weights, order, slot)]

        size = 24 * T * K if op == "sort_by_expert" else 2 * T * (K + 1) * D
        flops = 2 * T * K * D if op == "combine" else 0
        yield Case(op=op, shape=f"{T} rows of {D}, {E} experts top-{K}", size=size, flops=flops, make=make)


def _rowwise(op: str, m: Maker) -> Iterator[Case]:
    moved, flops = ROWWISE[op]
    for T in (1, 64, 2048):

        def make(T: int = T) -> Arguments:
            x = m.rows(T, D)
            norm = (m.rows(D), 1e-6)
            return [
                {"rms_norm": (x, *norm), "add_rms_norm": (x, x, *norm), "pointwise": (torch.sigmoid, x)}.get(op, (x,))
            ]

        yield Case(op=op, shape=f"{T} x {D}", size=2 * moved * T * D, flops=flops * T * D, make=make)


def _turns(m: Maker) -> Tensor:
    return 1e6 ** (-torch.arange(0, HEAD, 2, device=m.device) / HEAD)


def _angles(m: Maker, tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens, device=m.device)[:, None] * _turns(m)
    return angles.cos(), angles.sin()


def _turned(op: str, m: Maker) -> Iterator[Case]:
    for T in (1, 64, 2048):

        def make(T: int = T) -> Arguments:
            how = _angles(m, T) if op == "rotate" else (torch.arange(T, device=m.device), _turns(m))
            return [(m.rows(T, H, HEAD), *how)]

        size, flops = 4 * T * H * HEAD, 3 * T * H * HEAD
        yield Case(op=op, shape=f"{T} x {H} heads of {HEAD}", size=size, flops=flops, make=make)


def _heads(m: Maker) -> Iterator[Case]:
    for T in ROWS[:3]:

        def make(T: int = T) -> Arguments:
            x, norm, angles = m.rows(T, D), m.rows(HEAD), _angles(m, T)
            ws = zip(m.weights(H * HEAD, D), m.weights(G * HEAD, D), m.weights(G * HEAD, D), strict=False)
            return [(x, *w, *angles, norm, norm, 1e-6) for w in ws]

        size, flops = 2 * (H + 2 * G) * HEAD * (D + T) + 2 * T * D, 2 * T * D * (H + 2 * G) * HEAD
        yield Case(op="heads", shape=f"{T} x {D} -> {H}/{G} heads", size=size, flops=flops, make=make)


def _top_k_gates(m: Maker) -> Iterator[Case]:
    for T in (1, 64, 2048):

        def make(T: int = T) -> Arguments:
            return [(m.rows(T, 128, dtype=torch.float32), 8)]

        yield Case(op="top_k_gates", shape=f"{T} rows, 8 of 128", size=T * (4 * 128 + 96), flops=5 * T * 128, make=make)


def _expert_rows(m: Maker) -> Iterator[Case]:
    def make() -> Arguments:
        x, ends = m.rows(512, D), m.tensor(range(512 // E, 513, 512 // E))
        both = zip(m.weights(E, 2 * HIDDEN, D), m.weights(E, HIDDEN, D), strict=False)
        return [(x, ends, w_in, w_out) for w_in, w_out in both]

    size, flops = 2 * (3 * E * D * HIDDEN + 2 * 512 * D), 6 * 512 * D * HIDDEN
    yield Case(op="expert_rows", shape=f"512 rows, {E} experts, {D} x {HIDDEN}", size=size, flops=flops, make=make)


def _linear_cross_entropy(m: Maker) -> Iterator[Case]:
    def make() -> Arguments:
        x, targets = m.rows(512, D), m.integers(VOCABULARY, 512)
        return [(x, w, targets) for w in m.weights(VOCABULARY, D)]

    size, flops = 2 * (VOCABULARY * D + 512 * D), 2 * 512 * VOCABULARY * D
    yield Case(op="linear_cross_entropy", shape=f"512 x {D} -> {VOCABULARY}", size=size, flops=flops, make=make)


def _cross_entropy(m: Maker) -> Iterator[Case]:
    for T in (16, 512):

        def make(T: int = T) -> Arguments:
            logits, targets = m.rows(T, VOCABULARY), m.integers(VOCABULARY, T)
            return [(logits, targets)]

        shape = f"{T} x {VOCABULARY}"
        yield Case(op="cross_entropy", shape=shape, size=2 * T * VOCABULARY, flops=4 * T * VOCABULARY, make=make)


def _sample_rows(m: Maker) -> Iterator[Case]:
    for R in (1, 64):

        def make(R: int = R) -> Arguments:
            scores, rows = m.rows(R, VOCABULARY, dtype=torch.float32), torch.arange(R, device=m.device)
            temperature, top_p, min_p = (torch.full((R,), x, dtype=torch.float64, device=m.device) for x in (1, 0.9, 0))
            return [(scores, temperature, torch.full_like(rows, 50), top_p, min_p, rows, rows, rows)]

        shape = f"{R} x {VOCABULARY}, top 50, top 0.9"
        yield Case(op="sample_rows", shape=shape, size=4 * R * VOCABULARY, flops=4 * R * VOCABULARY, make=make)


def _prefill(m: Maker) -> Iterator[Case]:
    for S in PROMPTS:

        def make(S: int = S) -> Arguments:
            q, k, v = m.rows(S, H, HEAD), m.rows(S, G, HEAD), m.rows(S, G, HEAD)
            cu = m.tensor([0, S])
            return [(q, k, v, cu)]

        flops, size = 4 * H * HEAD * S * (S + 1) / 2, 2 * S * HEAD * (2 * H + 2 * G)
        shape = f"{S} tokens, {H}/{G} heads"
        yield Case(op="varlen_attention", shape=shape, size=size, flops=flops, make=make, keywords=SCALE)


def _paged(m: Maker) -> Iterator[Case]:
    for context in CONTEXTS:
        for batch in BATCHES:
            if batch * context * G * HEAD * 4 <= MOST:
                yield _pages_case(m, batch, 1, context)
    for S in PROMPTS:
        yield _pages_case(m, 1, S, S)


def _pages_case(m: Maker, batch: int, queries: int, context: int) -> Case:
    each = -(-context // PAGE)
    size = 4 * batch * context * G * HEAD
    copies = max(min(m.cold // size, 16), 1)

    def make() -> Arguments:
        q = m.rows(batch * queries, H, HEAD)
        k, v = (m.weight(copies * batch * each, PAGE, G, HEAD) for _ in range(2))
        blocks = torch.randperm(copies * batch * each, generator=torch.Generator().manual_seed(0)).int()
        tables = [table.contiguous().to(m.device) for table in blocks.view(copies, batch, each)]
        lengths, cu = m.tensor([context] * batch), m.tensor(range(0, batch * queries + 1, queries))
        return [(q, k, v, table, lengths, cu) for table in tables]

    flops = 4 * H * HEAD * batch * queries * (context - (queries - 1) / 2)
    what = "decode" if queries == 1 else f"prefill of {queries}"
    shape = f"{what}, {batch} x {context}, {H}/{G} heads"
    moved = size + 4 * batch * queries * H * HEAD
    return Case(op="paged_attention", shape=shape, size=moved, flops=flops, make=make, keywords=SCALE)


def _store_kv(m: Maker) -> Iterator[Case]:
    for T in (1, 64, 2048):

        def make(T: int = T) -> Arguments:
            k, v = m.rows(T, G, HEAD), m.rows(T, G, HEAD)
            cache_k, cache_v = (m.weight(256, PAGE, G, HEAD) for _ in range(2))
            slots = torch.randperm(256 * PAGE, generator=torch.Generator().manual_seed(0))[:T].to(m.device)
            return [(k, v, cache_k, cache_v, slots)]

        yield Case(op="store_kv", shape=f"{T} x {G} heads of {HEAD}", size=8 * T * G * HEAD, flops=0, make=make)


def _noted(op: str, m: Maker) -> Iterator[Case]:
    return noted_cases(op, m, E, K, 256 * PAGE)


def _square_sum(m: Maker) -> Iterator[Case]:
    size, flops = 4 * D * D, 2 * D * D
    yield Case(
        op="square_sum", shape=f"{D} x {D}", size=size, flops=flops, make=lambda: [(m.rows(D, D, dtype=torch.float32),)]
    )


def _adamw_step(m: Maker) -> Iterator[Case]:
    yield Case(
        op="adamw_step", shape=f"{D} x {D}", size=28 * D * D, flops=15 * D * D,
        make=lambda: [tuple(m.rows(D, D, dtype=torch.float32).abs() for _ in range(4))],
        keywords={"step": 1, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1},
    )  # fmt: skip


def _copy_blocks(m: Maker) -> Iterator[Case]:
    def make() -> Arguments:
        held = m.weight(4, 128, PAGE, G, HEAD)
        sources, targets = torch.arange(16, device=m.device), torch.arange(64, 80, device=m.device)
        return [(held, sources, targets)]

    size = 4 * 4 * 16 * PAGE * G * HEAD
    yield Case(op="copy_blocks", shape=f"16 of {PAGE} tokens, 4 layers", size=size, flops=0, make=make)


CASES: Mapping[str, Callable[[Maker], Iterator[Case]]] = {
    "linear": _all_linear,
    "head_gemm": _head_gemm,
    "grouped_gemm": _grouped_gemm,
    "moe_mlp": _moe_mlp,
    "quantized_linear": _quantized_linear,
    "quantized_moe_mlp": _quantized_moe_mlp,
    **{op: functools.partial(_routing, op) for op in ("sort_by_expert", "permute", "combine")},
    **{op: functools.partial(_rowwise, op) for op in ROWWISE},
    "expert_rows": _expert_rows,
    "heads": _heads,
    "top_k_gates": _top_k_gates,
    **{op: functools.partial(_turned, op) for op in ("rotate", "rope")},
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "sample_rows": _sample_rows,
    "square_sum": _square_sum,
    "adamw_step": _adamw_step,
    "varlen_attention": _prefill,
    "paged_attention": _paged,
    "store_kv": _store_kv,
    **{op: functools.partial(_noted, op) for op in ("tally_routes", "store_routes")},
    "copy_blocks": _copy_blocks,
}
