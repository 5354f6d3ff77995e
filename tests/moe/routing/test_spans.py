"""Over which tokens a loss is taken: groups, padding, ranks, micro-batches, and sums that a recalled decision knows."""

import itertools
import math

import pytest
import torch

from turnout.moe.routing.router import Scores
from turnout.tests.helpers.losses import LOSSES, OVER, PRODUCTS, SPREADS, Case

CLOSE = {"rtol": 1e-9, "atol": 1e-14}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "global_batch"])
def test_groups_are_weighted_by_their_valid_tokens(name):
    case = Case.random(7)
    valid, cu_groups = [True] * 4 + [False] + [True] * 2, torch.tensor([0, 4, 4, 5, 7])  # empty and padding groups too
    parts = 4 * case.rows(slice(0, 4)).loss(name), 2 * case.rows(slice(5, 7)).loss(name)
    torch.testing.assert_close(case.loss(name, valid=valid, cu_groups=cu_groups), sum(parts) / 6, **CLOSE)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", LOSSES)
def test_rows_matter_to_sequence_statistics_only(name, over):
    case = Case.random()
    apart, together = case.loss(name, over, cu_groups=torch.tensor([0, 6, 13])), case.loss(name, over)
    by_row = name == "sequence" or (over == "sequence" and name not in ("global_batch", "z"))
    assert (abs(apart - together) > 1e-3) == by_row


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_invisible_in_value_and_gradient(name, over):
    case, valid = Case.random(), torch.arange(13) % 3 != 1
    where = {"valid": valid, "cu_groups": torch.tensor([0, 6, 13])}
    padded = case.loss(name, over, **where)
    bare = case.rows(valid).loss(name, over, cu_groups=torch.tensor([0, valid[:6].sum(), valid.sum()]))
    torch.testing.assert_close(padded, bare, **CLOSE)
    torch.testing.assert_close(case.gradient(padded), case.gradient(bare), **CLOSE)
    nan = {n: v.masked_fill(~valid[:, None], math.nan) for n, v in vars(case.scores).items()}
    weights = case.weights.masked_fill(~valid[:, None], math.nan)
    assert torch.equal(
        Case(case.logits, case.noise, Scores(**nan), case.ids, weights).loss(name, over, **where), padded
    )


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_valid_token_value_and_gradient_are_zero(name, over, tokens):
    case = Case.random(tokens)
    loss = case.loss(name, over, valid=torch.zeros(tokens, dtype=torch.bool), cu_groups=torch.tensor([0, tokens]))
    assert loss.item() == 0
    assert (case.gradient(loss) == 0).all()


# Ranks ----------------------------------------------------------------------------------------------------------------


def parts_of(name, case, cuts, over):
    """The loss of each slice of the tokens, as a rank that is told the sum over all slices."""
    slices = [case.rows(slice(a, b)) for a, b in itertools.pairwise(cuts)]
    where = {"over": over, "total_tokens": len(case.ids)}
    said = []
    for part in slices:
        part.loss(name, reducer=lambda own: said.append(own) or own, **where)
    assert len(said) in (0, len(slices)), "at most one reduction a loss"
    return [part.loss(name, reducer=lambda own: sum(said), **where) for part in slices]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [(0, 13), (0, 4, 13), (0, 0, 4, 9, 13)])
def test_parts_of_ranks_add_up_in_value_and_gradient(name, cuts):
    case = Case.random()
    rows = {"cu_groups": torch.tensor(cuts)} if name == "sequence" else {}
    whole, parts = case.loss(name, "global_batch", **rows), sum(parts_of(name, case, cuts, "global_batch"))
    torch.testing.assert_close(parts, whole, **CLOSE)
    torch.testing.assert_close(case.gradient(parts), case.gradient(whole), **CLOSE)


@pytest.mark.parametrize("name", [*PRODUCTS, *SPREADS])
def test_micro_batch_statistics_depend_on_the_cut(name):
    case = Case.random()
    gap = sum(parts_of(name, case, (0, 4, 13), "micro_batch")) - case.loss(name, "micro_batch")
    assert (abs(gap) > 1e-3) == (name != "global_batch")


# Micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["balance", "global_batch", "device"])
def test_a_micro_batch_uses_the_counts_of_those_before_it(name):
    case, tally = Case.random(10), {}
    for start, end in ((0, 4), (4, 10)):
        got = case.rows(slice(start, end)).loss(name, "global_batch", tally=tally, total_tokens=10)
        share = torch.bincount(case.ids[:end].flatten(), minlength=5).double() / (2 * end)
        torch.testing.assert_close(got, 5 * (share * case.scores.probs[start:end].sum(0)).sum() / 10, **CLOSE)
    assert tally[0, name][0].tolist() == [*torch.bincount(case.ids.flatten(), minlength=5).tolist(), 10]


@pytest.mark.parametrize("name", SPREADS)
def test_a_spread_is_of_all_micro_batches_so_far(name):
    case, tally = Case.random(10), {}
    for start, end in ((0, 4), (4, 10)):
        got = case.rows(slice(start, end)).loss(name, "global_batch", tally=tally, total_tokens=10)
        so_far = case.rows(slice(0, end)).loss(name)
        torch.testing.assert_close(got, so_far * (end - start) / 10, **CLOSE)
        own = torch.zeros(10, 5, dtype=torch.bool)
        own[start:end] = True
        wanted = case.gradient(so_far) * end / 10 * own.flatten().repeat(2)
        torch.testing.assert_close(case.gradient(got), wanted, **CLOSE)
    assert tally[0, name][0, -1] == 10
    assert not tally[0, name].requires_grad


@pytest.mark.parametrize("name", SPREADS)
def test_an_early_micro_batch_does_not_pull_harder_than_its_share(name):
    case, tally = Case.random(6), {}
    twice = [case.gradient(case.loss(name, "global_batch", tally=tally, total_tokens=12)) for _ in range(2)]
    torch.testing.assert_close(twice[0], twice[1], **CLOSE)
    torch.testing.assert_close(sum(twice), case.gradient(case.loss(name)), **CLOSE)


def test_layers_and_losses_do_not_share_a_tally():
    case, tally = Case.random(), {}
    for name in ("balance", "global_batch", "importance"):
        case.loss(name, "global_batch", tally=tally)
    assert set(tally) == {(0, "balance"), (0, "global_batch"), (0, "importance")}
    assert {int(sums[0, -1]) for sums in tally.values()} == {13}
    case.loss("balance", "sequence", tally=tally)
    case.loss("balance", "micro_batch", tally=tally)
    assert int(tally[0, "balance"][0, -1]) == 13


# Recalled and replayed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["global_batch", *SPREADS])
def test_recalled_sums_are_taken_and_nothing_is_summed_again(name):
    case, tally = Case.random(), {}
    span = case.span("global_batch", reducer=lambda own: 3 * own)
    first = case.measured(name, span)
    again = case.loss(name, "global_batch", known=span.sums, tally=tally, reducer=lambda own: 1 / 0)
    assert torch.equal(again, first)
    assert torch.equal(case.gradient(again), case.gradient(first))
    assert not tally
    assert not span.sums[name].requires_grad


@pytest.mark.parametrize("over", ["sequence", "micro_batch"])
def test_sums_of_what_is_at_hand_are_not_recorded(over):
    span = Case.random().span(over, reducer=lambda own: 1 / 0)
    for name in ("balance", "importance", "load", "z"):
        Case.random().measured(name, span)
    assert not span.sums


def test_a_recalled_decision_passes_its_sums_on():
    case = Case.random()
    span = case.span("global_batch", known={"importance": torch.ones(1, 6, dtype=torch.float64)})
    case.measured("importance", span)
    assert set(span.sums) == {"importance"}
