"""Latent attention over ranks: divided heads, rows, layers and weights compute what one rank does."""

import dataclasses

import pytest
import torch

from turnout.moe.config import AttentionConfig, LatentConfig
from turnout.tests.distributed.test_layouts import BOUND, assert_same_training
from turnout.tests.distributed.test_matrix import alone, check
from turnout.tests.distributed.tiny_training import Case, gathered, train
from turnout.tests.helpers.ranks import run_ranks

LATENT = LatentConfig(rank=6, rope_dim=4, value_dim=5, query_rank=7)
FULL = pytest.mark.full


def case(latent: LatentConfig = LATENT, **changes) -> Case:
    """Four heads, a dense and a sparse block, documents inside rows."""
    heads = {"heads": 4, "kv_heads": 4, "head_dim": 6, "attention": AttentionConfig(latent=latent)}
    moe = (("every", 2), ("shared_experts", 1))
    base = {
        "router": "topk_softmax",
        "capacity_factor": None,
        "documents": True,
        "model": tuple(heads.items()),
        "moe": moe,
    }
    return Case(**{**base, **changes})


@pytest.mark.parametrize(
    ("world", "sizes", "ep"),
    [
        pytest.param(2, {"tp": 2}, 1, id="tp2"),
        pytest.param(2, {"tp": 2}, 2, id="tp2 ep2", marks=FULL),
        pytest.param(4, {"tp": 4}, 2, id="tp4 ep2", marks=FULL),
        pytest.param(4, {"tp": 2}, 2, id="dp2 tp2", marks=FULL),
        pytest.param(4, {"tp": 2, "cp": 2}, 1, id="tp2 cp2", marks=FULL),
    ],
)
@pytest.mark.parametrize("query_rank", [7, pytest.param(None, marks=FULL)])
def test_ranks_divide_the_heads_and_compute_what_one_rank_does(world, sizes, ep, query_rank):
    divided = case(dataclasses.replace(LATENT, query_rank=query_rank), sizes=tuple(sizes.items()), ep=ep)
    views, expected = run_ranks(train, world, divided), alone(divided)
    assert torch.equal(gathered(views, "ids/1"), gathered(expected, "ids/1"))
    assert_same_training(views, expected, BOUND[torch.float64])


@FULL
@pytest.mark.parametrize("world", [2, 4])
def test_rows_are_divided(world):
    check(case(sizes=(("cp", world),), dense=True, micro_batches=8 // world), world)


@FULL
def test_layers_are_divided():
    divided = case(sizes=(("pp", 2),), micro_batches=4)
    assert_same_training(run_ranks(train, 2, divided), alone(divided), BOUND[torch.float64])


@FULL
def test_weights_are_divided():
    divided = case(sizes=(("fsdp", True),))
    assert_same_training(run_ranks(train, 2, divided), alone(divided), BOUND[torch.float64])


@FULL
def test_compiled_blocks_compute_the_same():
    plain = case(dtype=torch.float32, optimizer="sgd")
    compiled = dataclasses.replace(plain, compile="aot_eager")
    assert_same_training([train(compiled)], [train(plain)], BOUND[torch.float32])
