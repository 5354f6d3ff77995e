"""Gathering and summing tokens over ranks: values, gradients, order, precision."""

import pytest
import torch
import torch.distributed as dist

from turnout.parallel import process
from turnout.parallel.gather import gather, gather_features, scatter_sum, scatter_tokens
from turnout.tests.helpers.ranks import run_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def exchange(dtype: torch.dtype, tokens: int) -> list[torch.Tensor]:
    """(gathered, its gradient, summed, its gradient) on this rank, of numbers that name rank and token."""
    group, rank, world = dist.group.WORLD, process.rank(), process.world()
    x_TD = torch.full((tokens, 2), float(rank + 1), dtype=dtype, requires_grad=True)
    x_AD = gather(x_TD, group, "x")
    x_AD.backward((torch.arange(world * tokens * 2).view(-1, 2) * 10**rank).to(dtype))
    y_AD = (torch.arange(world * tokens * 2).view(-1, 2) * 10**rank).to(dtype).requires_grad_()
    y_TD = scatter_sum(y_AD, group, "y")
    y_TD.backward(torch.full_like(y_TD, float(rank + 1)))
    return [tensor.detach() for tensor in (x_AD, x_TD.grad, y_TD, y_AD.grad)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 0])
def test_gathering_sums_gradients_and_summing_gathers_them(dtype, tokens):
    numbers = torch.arange(3 * tokens * 2).view(3, tokens, 2)
    for rank, (x_AD, x_grad, y_TD, y_grad) in enumerate(run_ranks(exchange, 3, dtype, tokens)):
        every = torch.arange(1, 4).repeat_interleave(tokens)[:, None].expand(-1, 2).to(dtype)
        assert torch.equal(x_AD, every)
        assert torch.equal(y_grad, every)
        terms = torch.stack([(numbers[rank] * 10**other).to(dtype) for other in range(3)])
        expected = terms.double().sum(0).to(dtype)
        assert torch.equal(x_grad, expected)
        assert torch.equal(y_TD, expected)


def features(tokens: int) -> list[torch.Tensor]:
    """All features of all tokens, and of this rank's; numbers name rank, token and feature."""
    group, rank = dist.group.WORLD, process.rank()
    x_Af = 100 * rank + 10 * torch.arange(2 * tokens)[:, None] + torch.arange(3)
    return [gather_features(x_Af, group, "x"), scatter_tokens(x_Af, group, "y")]


@pytest.mark.parametrize("tokens", [2, 0])
def test_features_of_all_ranks_lie_side_by_side_in_the_order_of_the_ranks(tokens):
    each = 100 * torch.arange(2)[:, None] + torch.arange(3)
    every_AF = 10 * torch.arange(2 * tokens)[:, None] + each.flatten()
    for rank, (x_AF, y_TF) in enumerate(run_ranks(features, 2, tokens)):
        assert torch.equal(x_AF, every_AF)
        assert torch.equal(y_TF, every_AF[rank * tokens : (rank + 1) * tokens])


def small_terms() -> torch.Tensor:
    terms_A = torch.full((3, 1), 256.0 if process.rank() == 1 else 1.0).bfloat16()
    return scatter_sum(terms_A, dist.group.WORLD, "terms")


def test_bfloat16_terms_are_added_in_float32():
    assert [float(y) for y in run_ranks(small_terms, 3)] == [258.0] * 3, "1 + 256 + 1 is 256 in bfloat16"
