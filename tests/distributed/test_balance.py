"""Balance losses and the loss-free bias over real ranks and accumulation, against one process with the whole batch.

Every rank has some rows of one global batch; what it adds up to must be what one rank with all rows gets.
"""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from turnout.moe import MoE, MoEConfig, RouteContext
from turnout.moe.routing.bias import update_biases
from turnout.parallel import process
from turnout.tests.helpers.ranks import run_ranks

PRODUCTS = ("balance", "sequence", "global_batch", "device")
SPREADS = ("importance", "load")
LENGTHS = (5, 3, 6, 4, 7, 2)  # tokens of each row, every fourth of the batch padding
STARTS = [sum(LENGTHS[:row]) for row in range(len(LENGTHS))]
TOTAL = sum(index % 4 != 3 for index in range(sum(LENGTHS)))
Steps = tuple[tuple[int, ...], ...]  # rows of each micro-batch

ALONE: Steps = ((0, 1, 2, 3, 4, 5),)
TWO: list[Steps] = [((0, 1),), ((2, 3, 4, 5),)]
IDLE: list[Steps] = [ALONE, ((),)]
FOUR: list[Steps] = [((5,),), ((),), ((0, 3, 4),), ((1, 2),)]


def make(router, over, **losses):
    """A layer in float64 whose only losses are those named."""
    coefficients = {f"{name}_loss": 0.0 for name in ("balance", "z", "importance", "load", "sequence")}
    coefficients |= {f"{name}_loss": value for name, value in losses.items()}
    if router != "noisy_topk":
        del coefficients["load_loss"]
    torch.manual_seed(0)
    cfg = MoEConfig(
        width=6, expert_width=4, num_experts=6, top_k=2, router=router, balance_over=over, device_groups=3,
        capacity_factor=None, **coefficients,
    )  # fmt: skip
    layer = MoE(cfg).double()
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def batch(rows):
    """Hidden states and surroundings of some rows, the same numbers wherever a row lies."""
    x = torch.randn(sum(LENGTHS), 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    index = torch.cat([torch.arange(STARTS[row], STARTS[row] + LENGTHS[row]) for row in rows] or [torch.arange(0)])
    ends = torch.tensor([0, *(LENGTHS[row] for row in rows)]).cumsum(0)
    return x[index], {"index_T": index, "valid_T": index % 4 != 3, "cu_groups": ends}


class Reducer:
    """The sum over ranks, counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, own):
        self.calls += 1
        return process.all_sum(own)


def balance_step(steps, router, over, names, remember=True, recompute=False):
    """One optimizer step's losses, router gradients (both summed over ranks) and what was reduced, of each loss."""
    result = {}
    mine = steps[process.rank()] if process.world() > 1 else steps
    for name in names:
        reducer, tally = Reducer(), {} if remember else None
        layer = make(router, over, **{name: 1.0})
        value = torch.zeros((), dtype=torch.float64)
        for rows in mine:
            x, surroundings = batch(rows)
            context = RouteContext(total_tokens=TOTAL, tally=tally, reducer=reducer, **surroundings)
            forward = functools.partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            y, routing = forward(x.requires_grad_(), context)
            (0 * y).sum().backward()
            value += routing.aux[name].detach()
        grad = torch.cat([p.grad.flatten() for p in layer.router.parameters()])
        seen = {key[1]: float(sums[0, -1]) for key, sums in (tally or {}).items()}
        result[name] = process.all_sum(value).item(), process.all_sum(grad), reducer.calls, seen
    return result


def assert_same(ours, theirs, grad_floor=1e-4):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name][0] == pytest.approx(theirs[name][0], rel=1e-12), name
        torch.testing.assert_close(ours[name][1], theirs[name][1], rtol=1e-10, atol=1e-13, msg=name)
        assert theirs[name][1].norm() > grad_floor, name


@functools.cache
def alone(steps, router, over, names):
    return balance_step(steps, router, over, names)


LAYOUTS = [
    pytest.param(TWO, id="two"),
    pytest.param(IDLE, id="idle"),
    pytest.param(FOUR, id="four", marks=pytest.mark.full),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("over", ["sequence", "global_batch"])
def test_ranks_get_the_losses_and_gradients_of_one(over, layout):
    names = (*PRODUCTS, *SPREADS, "z")
    one = alone(ALONE, "noisy_topk", over, names)
    reduced = {"global_batch"} if over == "sequence" else set(names) - {"sequence", "z"}
    for rank in run_ranks(balance_step, len(layout), layout, "noisy_topk", over, names):
        assert_same(rank, one)
        for name in names:  # one reduction a loss, of which balance is always measured
            assert rank[name][2] == len({name, "balance"} & reduced), name


def test_rows_are_the_same_under_any_accumulation():
    names = ("balance", "sequence", "device", *SPREADS, "z")
    layout = [((0,), (5,), ()), ((2, 3), (1,), (4,))]
    for rank in run_ranks(balance_step, 2, layout, "noisy_topk", "sequence", names):
        assert_same(rank, alone(ALONE, "noisy_topk", "sequence", names))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([((0,), (1, 2)), ((3,), (4, 5))], id="two"),
        pytest.param([((), (1, 2, 4, 5)), ((0, 3), ())], id="idle"),
        pytest.param([((0,), (5,)), ((), (1, 2)), ((3,), ()), ((), (4,))], id="four", marks=pytest.mark.full),
    ],
)
def test_the_step_so_far_is_the_same_on_any_number_of_ranks(layout):
    names = (*PRODUCTS[2:], "balance", *SPREADS)
    together = ((0, 3), (1, 2, 4, 5))
    one = alone(together, "noisy_topk", "global_batch", names)
    ranks = run_ranks(balance_step, len(layout), layout, "noisy_topk", "global_batch", names)
    for rank in ranks:
        assert_same(rank, one)
        assert {name: rank[name][2] for name in names} == {name: 2 * len({name, "balance"}) for name in names}
    for name in names:  # every rank keeps its own sums; together they are the whole step's
        assert sum(rank[name][3][name] for rank in ranks) == TOTAL


def test_earlier_micro_batches_count():
    names = ("global_batch", *SPREADS)
    steps = ((0, 1), (2, 3), (4, 5))
    known, forgotten = (
        balance_step(steps, "noisy_topk", "global_batch", names, remember) for remember in (True, False)
    )
    for name in names:
        assert abs(known[name][0] - forgotten[name][0]) > 1e-3, name


def test_micro_batch_statistics_depend_on_the_layout():
    names = ("balance", "device", *SPREADS)
    one = alone(ALONE, "noisy_topk", "micro_batch", names)
    two = run_ranks(balance_step, 2, TWO, "noisy_topk", "micro_batch", names)[0]
    for name in names:
        assert abs(two[name][0] - one[name][0]) > 1e-3, name
        assert two[name][2] == 0, name


def test_recomputation_neither_reduces_nor_counts_again():
    names = ("global_batch", *SPREADS)
    layout = [((0,), (1, 2)), ((3,), (4, 5))]
    plain, again = (
        run_ranks(balance_step, 2, layout, "noisy_topk", "global_batch", names, True, recompute)
        for recompute in (False, True)
    )
    for before, after in zip(plain, again, strict=True):
        assert_same(after, before)
        assert {name: after[name][2:] for name in names} == {name: before[name][2:] for name in names}


# The loss-free bias ---------------------------------------------------------------------------------------------------


def biased_steps(steps, count):
    """The bias and the counts after some optimizer steps, moved once each by the counts of the global batch."""
    layer = make("deepseek_v3", "sequence").train()
    mine, seen = steps[process.rank()] if process.world() > 1 else steps, []
    for _ in range(count):
        counts = torch.zeros(6, dtype=torch.int64)
        for rows in mine:
            x, surroundings = batch(rows)
            counts += layer(x, RouteContext(total_tokens=TOTAL, **surroundings))[1].counts_E
        counts = process.all_sum(counts)
        update_biases(layer, {0: counts})
        seen.append(counts.tolist())
    return layer.router.balance_bias.tolist(), seen


@pytest.mark.parametrize("layout", [[((0,), (1, 2)), ((3, 4, 5), ())], IDLE], ids=["two", "idle"])
def test_bias_over_ranks_and_accumulation_is_one_process(layout):
    one, counts = biased_steps(ALONE, 40)
    assert sum(counts[0]) == 2 * TOTAL
    assert counts[0] != counts[-1]  # the bias has moved a choice
    assert run_ranks(biased_steps, 2, layout, 40) == [(one, counts)] * 2
