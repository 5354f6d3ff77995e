"""Selective precision (Switch 2101.03961 §2.4): the router is float32, what travels between ranks is not."""

import pytest
import torch

from turnout.moe import MoE, MoEConfig
from turnout.parallel import ParallelConfig, build_mesh, parallelize, process
from turnout.tests.helpers.ranks import run_ranks

RANKS, EXPERTS, TOKENS, WIDTH = 2, 4, 24, 16


def exchanged(dtype: str, router_dtype: str) -> tuple[int, int]:
    """The bytes that this rank sent in a forward and a backward pass, and its rows for the other rank's experts."""
    torch.manual_seed(0)
    cfg = MoEConfig(width=WIDTH, expert_width=8, num_experts=EXPERTS, router="gshard", router_dtype=router_dtype)
    layer = torch.nn.Sequential(MoE(cfg))
    mesh = build_mesh(ParallelConfig(ep=RANKS), num_experts=EXPERTS)
    parallelize(layer, mesh)
    x = torch.randn(RANKS, TOKENS, WIDTH)[process.rank()].requires_grad_()
    with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
        y, routing = layer[0](x)
    y.float().sum().backward()
    theirs = (routing.ids_TK // (EXPERTS // RANKS) != process.rank()) & routing.kept_TK
    return layer[0].dispatcher.traffic.bytes, int(theirs.sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("router_dtype", ["float32", "bfloat16"])
def test_rows_travel_in_the_training_dtype_whatever_the_router_s_is(dtype, router_dtype):
    """There and back, forward and backward: two times this rank's rows and two times the other's, nothing else."""
    found = run_ranks(exchanged, RANKS, dtype, router_dtype)
    rows = sum(sent for _, sent in found)
    assert rows > 0
    assert [size for size, _ in found] == [2 * rows * WIDTH * getattr(torch, dtype).itemsize] * RANKS
