"""The loss scale: a power of two that halves at once and doubles slowly."""

import torch

from turnout.parallel.engine.scale import FIRST, FLOOR, LossScale


def test_it_doubles_after_good_steps_in_a_row_and_halves_at_once():
    scale = LossScale(8.0, grow_after=3)
    found = []
    for finite in (True, True, False, True, True, True, True, True, True, False):
        assert scale.update(finite) is not finite
        found.append(scale.factor)
    assert found == [8, 8, 4, 4, 4, 8, 8, 8, 16, 8]
    assert scale.good == 0


def test_at_the_floor_the_scale_is_not_to_blame_and_begins_anew():
    scale = LossScale()
    tries = [scale.update(False) for _ in range(17)]
    assert tries == [True] * 16 + [False]
    assert FIRST / 2**16 == FLOOR
    assert scale.factor == FIRST


def test_unscaling_is_exact():
    grads = torch.randn(100)
    scaled = grads * LossScale().factor
    LossScale().unscale([scaled])
    assert torch.equal(scaled, grads)
