"""Experts on two ranks give the bits of experts on one, where kernels are batch-invariant.

T tokens, D width.
"""

# ruff: noqa: N802 (S0 is the name of a rule)

import pytest
import torch
from torch import nn

from turnout.kernels.registry import using
from turnout.moe import MoE, MoEConfig, RouteContext
from turnout.parallel import process
from turnout.parallel.config import ParallelConfig
from turnout.parallel.dispatch.all_to_all import AllToAllDispatcher
from turnout.parallel.dispatch.traffic import Traffic
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks

WIDTH, EXPERTS, TOKENS = 128, 6, 13
SHARES = {"uneven": (0, 1, TOKENS), "one rank has nothing": (0, 0, TOKENS), "three": (0, 5, 6, TOKENS)}


def layer_and_tokens(dtype: torch.dtype) -> tuple[MoE, torch.Tensor]:
    torch.manual_seed(5)
    cfg = MoEConfig(width=WIDTH, expert_width=27, num_experts=EXPERTS, top_k=2, router="topk_softmax", shared_experts=1)
    return MoE(cfg).to(dtype).eval().requires_grad_(False), torch.randn(TOKENS, WIDTH).to(dtype)


def compute(layer: MoE, x_TD: torch.Tensor, form: str | None) -> torch.Tensor:
    with using(form):
        return layer(x_TD, RouteContext(dropless=True))[0]


def spread(share: str, dtype: torch.dtype, form: str | None, chunks: int) -> torch.Tensor:
    """This rank's tokens through its own and the other ranks' experts."""
    mesh = build_mesh(ParallelConfig(ep=process.world(), chunks=chunks), num_experts=EXPERTS)
    layer, x_TD = layer_and_tokens(dtype)
    held = EXPERTS // mesh.ep_size
    mine = slice(held * mesh.ep_rank, held * (mesh.ep_rank + 1))
    for name in ("w_in", "w_out"):
        part = getattr(layer.experts, name)[mine].clone()
        setattr(layer.experts, name, nn.Parameter(part, requires_grad=False))
    layer.dispatcher = AllToAllDispatcher(mesh, EXPERTS, Traffic())
    borders = SHARES[share]
    return compute(layer, x_TD[borders[mesh.rank] : borders[mesh.rank + 1]], form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [name for name in SHARES if name != "three"])
def test_S0_experts_on_two_ranks_give_the_bits_of_one(share, dtype):
    whole = compute(*layer_and_tokens(dtype), "invariant")
    assert torch.equal(torch.cat(run_ranks(spread, 2, share, dtype, "invariant", 1)), whole)


@pytest.mark.full
@pytest.mark.parametrize("chunks", [1, 2])
def test_S0_experts_on_three_ranks_give_the_bits_of_one(chunks):
    whole = compute(*layer_and_tokens(torch.float32), "invariant")
    assert torch.equal(torch.cat(run_ranks(spread, 3, "three", torch.float32, "invariant", chunks)), whole)


@pytest.mark.full  # another CPU's library may keep it
def test_S0_the_librarys_products_do_not():
    """The mutant of the tests above."""
    whole = compute(*layer_and_tokens(torch.float32), None)
    found = torch.cat(run_ranks(spread, 2, "uneven", torch.float32, None, 1))
    torch.testing.assert_close(found, whole)
    assert not torch.equal(found, whole)
