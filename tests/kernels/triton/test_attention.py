"""Paged attention in Triton, interpreted with its production tiles, against float64 and against itself."""

import dataclasses

import pytest
import torch

from turnout import kernels
from turnout.kernels import paged_attention, registry
from turnout.kernels.configs import attention_tile
from turnout.kernels.reference.attention import quantise
from turnout.kernels.triton.attention import attend

BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHORT = 32  # keys of a chunk, where chunks are tested
# heads, groups, width, width of the values
HEADS = [(1, 1, 16, 16), (4, 2, 40, 40), (14, 2, 64, 64), (20, 1, 24, 16), (3, 3, 96, 80)]
# (queries, context) of each sequence
STEPS = [[], [(1, 1)], [(1, 70), (1, 5), (1, 33)], [(0, 9), (40, 40), (3, 77), (1, 64)], [(17, 17), (0, 0), (1, 2)]]


def make(heads, step, dtype, size=8, int8=False):
    """Pages full of NaN but for the sequences' tokens, in scattered blocks; the tables end in blocks that are not."""
    H, G, D, V = heads
    counts = [-(-context // size) for _, context in step]
    blocks = torch.randperm(sum(counts) + 1)[: sum(counts)]
    tables = torch.full((len(step), max([*counts, 0]) + 2), 10**6, dtype=torch.int32)
    pages = [torch.full((sum(counts) + 1, size, G, width), torch.nan) for width in (D, V)]
    for b, (own, (_, context)) in enumerate(zip(blocks.split(counts), step, strict=True)):
        tables[b, : len(own)] = own
        for page in pages:
            at = torch.arange(context)
            page[own[at // size], at % size] = torch.randn(context, G, page.shape[-1])
    cu_q = torch.tensor([0, *(queries for queries, _ in step)]).cumsum(0)
    contexts = torch.tensor([context for _, context in step], dtype=torch.int64)
    q = torch.randn(int(cu_q[-1]), H, D).to(dtype)
    options = {"scale": D**-0.5}
    if int8:
        (k, options["scales_k"]), (v, options["scales_v"]) = map(quantised, pages)
    else:
        k, v = (page.to(dtype) for page in pages)
    return (q, k, v, tables, contexts, cu_q.int()), options


def quantised(page):
    rows, scales = quantise(page.nan_to_num().flatten(0, 1))
    return rows.view(page.shape), scales.view(page.shape[:3])


def truth_of(args, options):
    q, k, v, *rest = args
    wide = [t if t.dtype == torch.int8 else t.double() for t in (k, v)]
    with kernels.using("reference"):
        return paged_attention(q.double(), *wide, *rest, **options)


def chunked(args, options, chunks=1, rows=None, chunk=SHORT):
    q = args[0]
    tile = attention_tile(rows or 10**6, q.shape[2], q.element_size())
    optional = dict.fromkeys(("window", "sinks_H", "bias_HR", "scales_k", "scales_v")) | {"causal": True}
    return attend(*args, **optional | options, tile=dataclasses.replace(tile, chunk=chunk), chunks=chunks)


def assert_near(value, truth, dtype):
    assert value.shape == truth.shape
    assert value.dtype == dtype
    assert not value.isnan().any()
    assert (value.double() - truth).norm() <= BOUND[dtype] * truth.norm()


def check(args, options):
    """The production form, and short chunks by one program and by programs of their own."""
    truth, dtype = truth_of(args, options), args[0].dtype
    with kernels.using("triton"):
        assert registry.choose("paged_attention", *args, **options) == "triton"
        assert_near(paged_attention(*args, **options), truth, dtype)
    if len(args[0]):
        alone = chunked(args, options)
        assert_near(alone, truth, dtype)
        apart = chunked(args, options, chunks=-(-args[3].shape[1] * args[1].shape[1] // SHORT), rows=1)
        assert torch.equal(apart, alone)


def extras(heads):
    return {
        "window": {"window": 11},
        "sinks and bias": {"sinks_H": torch.randn(heads[0]), "bias_HR": torch.randn(heads[0], 9)},
        "both ways": {"causal": False},
        "both ways in a window": {"causal": False, "window": 6},
    }


def test_prompts_and_single_tokens_agree_with_float64_whoever_merges_the_chunks():
    args, options = make((6, 2, 40, 40), [(20, 20), (1, 40), (0, 3)], torch.bfloat16)
    check(args, options | extras((6,))["sinks and bias"])


def test_a_query_has_the_same_bits_in_a_prompt_and_alone():
    args, options = make((4, 2, 16, 16), [(19, 45), (30, 30)], torch.bfloat16)
    together = chunked(args, options)
    q, k, v, tables, _, _ = args
    for at, b, context in ((0, 0, 27), (18, 0, 45), (19, 1, 1), (48, 1, 30)):
        one = (q[at : at + 1], k, v, tables[b : b + 1], torch.tensor([context]), torch.tensor([0, 1]))
        for chunks in (1, 2):
            assert torch.equal(chunked(one, options, chunks=chunks, rows=1), together[at : at + 1])


def test_values_may_be_the_keys_first_numbers():
    (q, k, _, *rest), options = make((20, 1, 72, 64), [(5, 40), (1, 9)], torch.bfloat16)
    check((q, k, k[..., :64], *rest), options)


def test_pages_of_int8_are_read_by_their_scales():
    check(*make((4, 2, 16, 16), [(3, 37), (1, 9)], torch.bfloat16, int8=True))


@pytest.mark.full
@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_grid(heads, step):
    """Every two of heads, steps and dtypes meet: all three at once take the interpreter half an hour."""
    dtype = list(BOUND)[(HEADS.index(heads) + STEPS.index(step)) % len(BOUND)]
    args, options = make(heads, step, dtype)
    for extra in ({}, *extras(heads).values()):
        check(args, options | extra)
    check(*make(heads, step, dtype, int8=True))


@pytest.mark.full
@pytest.mark.parametrize("dtype", BOUND)
def test_wide_latent_pages(dtype):
    (q, k, _, *rest), options = make((18, 1, 576, 512), [(2, 40), (1, 700)], dtype, size=16)
    check((q, k, k[..., :512], *rest), options)
