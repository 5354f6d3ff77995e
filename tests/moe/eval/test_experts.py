"""The expert report, by hand."""

import math

import pytest
import torch

from turnout.moe.eval.experts import ExpertTally
from turnout.moe.routing.record import Routing


def routing(ids, kept, probs):
    ids_TK = torch.tensor(ids)
    probs_TE = torch.tensor(probs)
    return Routing(
        ids_TK=ids_TK,
        weights_TK=torch.ones(ids_TK.shape),
        kept_TK=torch.tensor(kept),
        counts_E=torch.bincount(ids_TK.flatten(), minlength=4),
        probs_TE=probs_TE,
        logits_TE=probs_TE.log(),
    )


UNDECIDED, SURE = [0.25] * 4, [1.0, 0.0, 0.0, 0.0]


def test_load_collapse_drops_and_entropy_by_hand():
    tally = ExpertTally((1, 3), 4)
    one = routing([[0, 1], [0, 2]], [[True, True], [False, True]], [UNDECIDED, SURE])
    other = routing([[0, 1]], [[True, False]], [SURE])
    tally.add({1: one, 3: other})
    tally.add({1: other, 3: other})
    first, second = tally.report(lambda sums: sums)
    assert (first.layer, second.layer) == (1, 3)
    assert first.load == pytest.approx((3 / 6, 2 / 6, 1 / 6, 0))
    assert first.max_over_mean == pytest.approx(2.0)
    assert first.dead == (3,)
    assert first.drop_fraction == pytest.approx(2 / 6)
    assert first.router_entropy == pytest.approx(math.log(4) / 3)
    assert second.dead == (2, 3)
    assert second.router_entropy == 0


def test_two_ranks_add_up():
    whole, half = ExpertTally((0,), 4), ExpertTally((0,), 4)
    one = routing([[0], [1]], [[True], [False]], [UNDECIDED, SURE])
    for _ in range(2):
        whole.add({0: one})
    half.add({0: one})
    assert whole.report(lambda sums: sums) == half.report(lambda sums: 2 * sums)


def test_nothing_routed_is_all_zero():
    (report,) = ExpertTally((0,), 4).report(lambda sums: sums)
    assert (report.load, report.max_over_mean, report.drop_fraction) == ((0.0,) * 4, 0.0, 0.0)
    assert report.dead == (0, 1, 2, 3)
