"""Figures of a run, of rounds, of pairs."""

import pytest

from turnout import ConfigError
from turnout.launch.benches import figures
from turnout.launch.benches.figures import Slo, summary
from turnout.launch.benches.online import Answer


def answer(ttft=1.0, gap=0.1, tokens=3, due=0.0, **fields):
    """Tokens `gap` apart, the first `ttft` after `due`."""
    times = tuple(due + ttft + i * gap for i in range(tokens))
    return Answer(
        **{"due": due, "sent": due, "times": times, "end": times[-1], "wanted": tokens, "tokens": tokens} | fields
    )


def test_tokens_count_over_all_the_time_from_when_the_first_was_due():
    found = summary([answer(ttft=1.0, due=2.0, tokens=1), answer(ttft=3.0, due=3.0, tokens=9, gap=0.0)], Slo())
    assert (found["seconds"], found["tokens_per_second"], found["requests_per_second"]) == (4.0, 10 / 4, 2 / 4)
    assert "goodput" not in found


def test_times_are_those_of_answers_and_late_is_the_clients_own():
    refused = answer(ttft=50.0, sent=5.0, outcome="429")
    found = summary([answer(ttft=float(i)) for i in range(1, 5)] + [refused], Slo())
    assert [found[f"ttft_{one}"] for one in ("mean", "p50", "p90", "p99")] == [2.5, 2.0, 4.0, 4.0]
    assert (found["late_p50"], found["late_p99"]) == (0.0, 5.0)
    assert found["itl_p50"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("fields", "met"),
    [
        ({}, True), ({"ttft": 1.5}, True), ({"ttft": 1.6}, False), ({"gap": 0.3}, False),
        ({"outcome": "broken"}, False), ({"tokens": 1, "gap": 9.0}, True), ({"times": ()}, False),
    ],
)  # fmt: skip
def test_the_objective_is_met_by_both(fields, met):
    assert Slo(ttft=1.5, tpot=0.2).met(answer(**fields)) is met


def test_an_objective_is_a_time():
    with pytest.raises(ConfigError, match=r"slo.tpot \(0\)"):
        Slo(tpot=0)


def test_rounds_have_medians_and_failures_add_up():
    rounds = [[answer(ttft=t), answer(outcome=bad)] for t, bad in ((1.0, "429"), (5.0, "broken"), (2.0, "429"))]
    found = figures.median([summary(one, Slo()) for one in rounds])
    assert found["ttft_p50"] == 2.0
    assert found["failed"] == {"429": 2, "broken": 1}
    assert (found["requests"], found["ok"]) == (6, 3)
    assert figures.median([{"a": 1.0, "b": 1.0}, {"a": 3.0}]) == {"a": 2.0}


def test_pairs_are_the_same_request_to_two_servers():
    rounds = 2
    one = [[answer(ttft=float(i), gap=0.1) for i in range(1, 11)] for _ in range(rounds)]
    other = [[answer(ttft=float(i * i), gap=0.2) for i in range(1, 11)] for _ in range(rounds)]
    other[0][9] = answer(outcome="429")
    ttft, tpot, e2e, speed = figures.ratios(one, other)
    assert (ttft["figure"], ttft["pairs"]) == ("ttft", 19)
    assert [ttft[name] for name in ("p10", "ratio", "p90")] == pytest.approx([1.0, 5.0, 9.0])
    assert tpot["p10"] == pytest.approx(2.0) == tpot["p90"]
    assert (e2e["figure"], speed["figure"], speed["pairs"]) == ("e2e", "tokens_per_second", 2)
    nothing = [[answer(outcome="429")]]
    assert [row["figure"] for row in figures.ratios(nothing, [[answer()]])] == []
