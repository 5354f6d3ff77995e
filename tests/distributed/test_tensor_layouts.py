"""Tensor parallelism computes what one rank does: every division of the heads, dense and sparse blocks, rows cut in the
middle; and the same bits however it recomputes."""

import dataclasses

import pytest
import torch

from turnout.moe.config import AttentionConfig
from turnout.tests.distributed import tiny_training
from turnout.tests.distributed.test_layouts import BOUND, PRECISIONS, assert_same_training
from turnout.tests.distributed.test_matrix import alone, check
from turnout.tests.distributed.test_recompute import assert_same, train_all
from turnout.tests.distributed.tiny_training import Case, gathered, train
from turnout.tests.helpers.ranks import run_ranks

DROPLESS = {"router": "topk_softmax", "capacity_factor": None, "documents": True}
EVERY_OTHER = (("every", 2), ("shared_experts", 1))  # a dense block, then a sparse one


def case(tp: int, kv_heads: int, **changes) -> Case:
    heads = (("heads", 4), ("kv_heads", kv_heads), ("head_dim", 4))
    return Case(**{**DROPLESS, "sizes": (("tp", tp),), "model": heads, "moe": EVERY_OTHER, **changes})


@pytest.mark.parametrize(("dtype", "optimizer"), PRECISIONS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_two_ranks_divide_the_heads_and_compute_what_one_rank_does(kv_heads, dtype, optimizer):
    assert_trains_like_one_rank(case(2, kv_heads, ep=2, dtype=dtype, optimizer=optimizer), 2)


BIASED = {"qkv_bias": True, "output_bias": True, "sinks": True, "window": 5, "window_layers": (0,)}
NORMED = {"qkv_bias": True, "qk_norm": "head", "clip": 0.3}
OSS = {"router": "gpt_oss", "moe": (("every", 1), ("activation", "swiglu_clamped"), ("bias", True))}


@pytest.mark.parametrize(
    ("tp", "kv_heads", "attention", "more"),
    [
        (2, 2, BIASED, OSS),
        (2, 1, NORMED, {}),
        pytest.param(2, 1, BIASED, {}, marks=pytest.mark.full),
        pytest.param(2, 4, NORMED, OSS, marks=pytest.mark.full),
        pytest.param(4, 2, BIASED | NORMED, OSS, marks=pytest.mark.full),
    ],
)
def test_biases_sinks_and_norms_are_divided_or_summed(tp, kv_heads, attention, more):
    plain = case(tp, kv_heads, ep=min(tp, 2), **more)
    divided = dataclasses.replace(plain, model=(*plain.model, ("attention", AttentionConfig(**attention))))
    assert_trains_like_one_rank(divided, tp)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_four_ranks_read_fewer_kv_heads_than_they_are(kv_heads):
    assert_trains_like_one_rank(case(4, kv_heads, ep=2), 4)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "optimizer"), PRECISIONS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (2, 4), (4, 1), (4, 4)])
def test_four_ranks_divide_the_heads_and_compute_what_one_rank_does(tp, ep, kv_heads, dtype, optimizer):
    assert_trains_like_one_rank(case(tp, kv_heads, ep=ep, dtype=dtype, optimizer=optimizer), 4)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_rows_are_cut_in_the_middle(world):
    rows = case(world, 2, dense=True, micro_batches=8)  # one row a micro-batch: every rank holds a part of each
    check(rows, world)


@pytest.mark.parametrize("changes", [{}, {"dense": True}], ids=["sparse", "dense"])
def test_recomputing_changes_no_bit(changes):
    views = run_ranks(train_all, 2, case(2, 1, ep=2, **changes), ("none", "selective", "full"))
    for view in views:
        assert_same(view["selective"], view["none"])
        assert_same(view["full"], view["none"])


def compiled(divided: Case, backend: str) -> dict:
    """`train` with compiled blocks."""
    from turnout.moe.train.compiled import compile_blocks

    plain, tiny_training.recompute = tiny_training.recompute, lambda model, _: compile_blocks(model.train(), backend)
    try:
        return tiny_training.train(divided)
    finally:
        tiny_training.recompute = plain


@pytest.mark.full
def test_compiled_blocks_are_divided_too():
    divided = case(2, 1, dtype=torch.float32, optimizer="sgd")
    views = run_ranks(compiled, 2, divided, "aot_eager", timeout=300)
    assert_same_training(views, alone(divided), BOUND[torch.float32])


def assert_trains_like_one_rank(divided: Case, world: int) -> None:
    views, expected = run_ranks(train, world, divided), alone(divided)
    assert torch.equal(gathered(views, "ids/1"), gathered(expected, "ids/1"))
    assert_same_training(views, expected, BOUND[divided.dtype])
