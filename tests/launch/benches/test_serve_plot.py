"""The picture has its panels for one load, for several, and for answers without times."""

import numpy as np
import pytest

from turnout.launch.benches import serve, serve_plot
from turnout.launch.benches.arrivals import Arrivals, loads
from turnout.launch.benches.figures import Slo
from turnout.launch.benches.online import Answer, Ask, Target


def answers(count, ttft, gap, *, streams=True):
    found = []
    for i in range(count):
        times = tuple(i + ttft + gap * j for j in range(10))
        found.append(
            Answer(due=float(i), sent=float(i), times=times if streams else (), end=times[-1], wanted=10, tokens=10)
        )
    return found


def test_tokens_are_spread_over_the_time():
    edges, values = serve_plot.rates(
        [*answers(50, 0.1, 0.05), Answer(**{**vars(answers(1, 9, 9)[0]), "outcome": "429"})]
    )
    assert (values * np.diff(edges)).sum() == pytest.approx(500)
    assert edges[0] == 0.0
    several = Answer(due=0.0, sent=0.0, times=(1.0, 2.0), end=3.0, wanted=6, tokens=6)
    at_once = Answer(due=0.0, sent=0.0, times=(), end=6.0, wanted=6, tokens=6)
    edges, values = serve_plot.rates([several, at_once])
    assert [round(at * 6 / serve_plot.BINS) for at in np.flatnonzero(values)] == [1, 2, 6]
    np.testing.assert_allclose(values[values > 0] * np.diff(edges)[0], [3, 3, 6])


@pytest.mark.parametrize(
    "arrivals", [Arrivals(), Arrivals(rate=(1.0, 2.0)), Arrivals(load="closed", concurrency=(1, 2))]
)
@pytest.mark.parametrize("streams", [True, False])
def test_a_picture_has_its_panels(arrivals, streams):
    contenders = [serve.Contender(name=name, target=Target(url=name, model="m")) for name in ("A", "B")]
    found = loads(arrivals, [Ask(prompt="x", tokens=10)] * 20)
    done = [
        serve.Turn(
            server=one.name, load=load, round=number, answers=answers(20, 0.1 * (i + 1), 0.02, streams=streams),
            client_share=0.1, alone={},
        )
        for number in range(2) for i, one in enumerate(contenders) for load in found
    ]  # fmt: skip
    rows = serve.rows(contenders, done, found, Slo(ttft=0.15) if streams else Slo())
    figure = serve_plot.picture(done, rows)
    ttft, tpot, speed, last = figure.axes
    lines = 2 * len(found) * (1 + streams)  # a step, and marks where there are times
    assert (len(ttft.lines), len(tpot.lines), len(speed.patches)) == (lines, lines, 2)
    assert speed.get_ylim()[1] >= max(patch.get_data().values.max() for patch in speed.patches)
    assert len(figure.legends[0].get_texts()) == 2 * len(found)
    if len(found) == 1:
        assert [line.get_ydata()[-1] for line in last.lines] == [0, 0]
        return
    goodput = [list(line.get_ydata()) for line in last.lines[:2]]
    assert goodput == [
        [row["goodput" if streams else "requests_per_second"] for row in rows if row["server"] == s] for s in "AB"
    ]
    if streams:
        assert goodput[1] == [0.0, 0.0]
