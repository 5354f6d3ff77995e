"""The schedule: a linear rise, then one of four falls, the same by steps and by seconds; no first step is wasted."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from turnout import ConfigError
from turnout.moe.train.config import OptimConfig, TrainConfig
from turnout.moe.train.schedule import progress, rate


def test_progress_is_by_steps_or_by_seconds():
    assert progress(TrainConfig(steps=200), 50, 1e9) == 0.25
    assert progress(TrainConfig(steps=None, seconds=180.0), 10**9, 45.0) == 0.25


def test_the_rate_rises_peaks_and_falls_to_its_end():
    optim = OptimConfig(warmup=0.1, final=0.2)
    assert rate(optim, 0.05, 10**9) == pytest.approx(0.5)
    assert rate(optim, 0.1, 0) == pytest.approx(1.0)
    assert rate(optim, 0.55, 0) == pytest.approx(0.6)
    assert rate(optim, 1.0, 0) == rate(optim, 7.0, 0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("constant", [1.0] * 5),
        ("wsd", [1.0, 1.0, 1.0, 0.2 + 0.8 * (1 - math.sqrt(0.5)), 0.2]),
    ],
)
def test_other_schedules_at_quarters_behind_the_warm_up(schedule, values):
    optim = OptimConfig(schedule=schedule, warmup=0.2, final=0.2, decay=0.4)
    assert rate(optim, 0.1, 10**9) == pytest.approx(0.5)
    found = [rate(optim, 0.2 + 0.8 * quarter / 4, 10**9) for quarter in range(5)]
    assert found == pytest.approx(values)


def test_a_cooldown_that_does_not_fit_is_refused():
    for decay in (0.0, 0.95):
        with pytest.raises(ConfigError, match=r"optim\.decay \(.*\) must lie .* leaves \(0\.9\): use"):
            OptimConfig(schedule="wsd", warmup=0.1, decay=decay)
    OptimConfig(schedule="wsd", warmup=0.1, decay=0.9)
    OptimConfig(decay=0.95, warmup=0.1)


def test_the_first_step_moves_even_at_no_progress():
    assert 0 < rate(OptimConfig(warmup=0.1), 0.0, 0) < 0.05
    assert rate(OptimConfig(warmup=0.0), 0.0, 0) == 1.0


@example("wsd", 0.9, 0.0, 0.0, 0)
@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6),
)  # fmt: skip
def test_the_rate_stays_between_zero_and_the_peak(schedule, warmup, final, done, step):
    value = rate(OptimConfig(schedule=schedule, warmup=warmup, final=final, decay=0.1), done, step)
    assert 0 <= value <= 1 + 1e-12
    assert math.isfinite(value)
