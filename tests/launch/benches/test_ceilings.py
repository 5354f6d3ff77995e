"""What the machine can do is measured, and rows are held against it."""

import pytest
import torch

from turnout.kernels.cpp.stream import read
from turnout.launch.benches import ceilings
from turnout.launch.benches.ceilings import Ceilings


@pytest.mark.parametrize("words", [0, 1, 8, 64, 8 * 17, 8 * 1000 + 5])
def test_all_whole_lines_are_read(words):
    x = torch.randint(-(2**62), 2**62, (words,))
    expected = 0
    for word in x[: words // 8 * 8].tolist():
        expected ^= word % 2**64
    assert read(x) == expected


@pytest.mark.parametrize("huge", [True, False])
def test_pages_are_memory_like_any_other(huge):
    x = ceilings.pages((3, 1000), torch.bfloat16, huge=huge)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 1000), torch.bfloat16, True)
    assert float(x.fill_(2).float().sum()) == 6000
    assert ceilings.pages((0, 4), torch.float32).numel() == 0


def test_a_machine_is_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "SIDE", 64)
    found = ceilings.measure(torch.device("cpu"))
    assert min(found.read, found.bfloat16, found.float32) > 1e6
    assert found.read >= found.read_small_pages
    assert "GB/s" in str(found)


def test_a_row_is_held_against_what_limits_it():
    one = Ceilings(read=10e9, read_small_pages=5e9, bfloat16=1e12, float32=1e11)
    other = Ceilings(read=20e9, read_small_pages=4e9, bfloat16=9e11, float32=2e11)
    best = one.or_better(other)
    assert best == Ceilings(read=20e9, read_small_pages=5e9, bfloat16=1e12, float32=2e11)
    by_memory = best.figures(seconds=2e-3, size=20e6, flops=1e6)
    assert by_memory["GB/s"] == pytest.approx(10)
    assert by_memory["of the ceiling"] == pytest.approx(0.5)
    by_product = best.figures(seconds=4e-3, size=1e3, flops=1e9)
    assert by_product["GFLOP/s"] == pytest.approx(250)
    assert by_product["of the ceiling"] == pytest.approx(0.25)
