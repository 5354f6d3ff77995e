"""The schedule: a linear rise, a cosine, the same by steps and by seconds, and never a wasted first step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_the_first_step_moves_even_at_no_progress():
    assert 0 < rate(OptimConfig(warmup=0.1), 0.0, 0) < 0.05
    assert rate(OptimConfig(warmup=0.0), 0.0, 0) == 1.0


@given(st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_the_rate_stays_between_zero_and_the_peak(warmup, final, done, step):
    value = rate(OptimConfig(warmup=warmup, final=final), done, step)
    assert 0 <= value <= 1 + 1e-12
    assert math.isfinite(value)
