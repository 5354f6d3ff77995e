"""The expert report: by hand, under the names and with the numbers of a training row."""

import dataclasses
import math

import pytest
import torch

from turnout.moe.eval.experts import ExpertReport, ExpertTally
from turnout.moe.routing.record import Routing
from turnout.moe.routing.stats import RoutingStats


def routing(ids, kept, probs):
    ids_TK = torch.tensor(ids)
    probs_TE = torch.tensor(probs)
    wanted_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    return Routing(
        ids_TK=ids_TK,
        weights_TK=torch.ones(ids_TK.shape),
        wanted_TK=wanted_TK,
        kept_TK=torch.tensor(kept),
        shares_TE=probs_TE,
        logits_TE=4 * probs_TE,
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
    assert first.expert_load == pytest.approx((3 / 6, 2 / 6, 1 / 6, 0))
    assert first.load_max_mean == pytest.approx(2.0)
    assert first.load_cv == pytest.approx(math.sqrt((1 + 1 / 9 + 1 / 9 + 1) / 4))
    assert first.dead_experts == 1
    assert first.drop_fraction == pytest.approx(2 / 6)
    assert first.router_entropy == pytest.approx(math.log(4) / 3)
    assert first.router_logit_norm == pytest.approx((2 + 4 + 4) / 3)
    assert second.dead_experts == 2
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
    assert (report.expert_load, report.load_max_mean, report.drop_fraction) == ((0.0,) * 4, 0.0, 0.0)
    assert report.dead_experts == 4


def test_a_dense_model_has_no_reports():
    assert ExpertTally((), 0).report(lambda sums: sums) == ()


def test_the_numbers_are_those_that_training_shows_under_the_same_names():
    tally, stats = ExpertTally((5,), 4), RoutingStats((5,), 4, torch.device("cpu"))
    one = routing([[0, 1], [0, 2]], [[True, True], [False, True]], [UNDECIDED, SURE])
    for counted in (tally, stats):
        counted.add({5: one})
    (report,) = tally.report(lambda sums: sums)
    row = stats.fields()
    names = {field.name for field in dataclasses.fields(ExpertReport)} - {"layer"}
    assert names == set(row) - {"moe_layers", "layer_drop_fraction"}
    one_layer = {name: row[name] if name == "drop_fraction" else row[name][0] for name in names}
    assert dataclasses.asdict(report) == {"layer": 5, **one_layer, "expert_load": tuple(one_layer["expert_load"])}
