"""Keys and values are written as the reference writes them, bit by bit."""

import itertools

import pytest
import torch

from turnout import kernels
from turnout.kernels import store_kv

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("to", [*TYPES, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pages_and_scales_are_the_references(dtype, to):
    for rows, d, head_major in itertools.product((0, 1, 300), (1, 15, 16, 128), (False, True)):
        size = 10.0 ** torch.randint(-3, 3, (rows, 1, 1))
        both = (torch.randn(rows, 3, 2 * d) * size).to(dtype)
        both[2:3] = 0
        slots, found = torch.randperm(20 * 16)[:rows], {}
        for form in ("reference", "cpp"):
            shape = (20, 3, 16, d) if head_major and form == "cpp" else (20, 16, 3, d)
            caches = [torch.zeros(shape, dtype=to) for _ in range(2)]
            caches = [c.transpose(1, 2) for c in caches] if shape[1] == 3 else caches
            scales = [torch.zeros(20, 16, 3) if to == torch.int8 else None for _ in range(2)]
            with kernels.using(form):
                store_kv(both[..., :d], both[..., d:], *caches, slots, *scales)
            found[form] = [*caches, *(s for s in scales if s is not None)]
        for ours, right in zip(found["cpp"], found["reference"], strict=True):
            assert torch.equal(ours, right), (rows, d, head_major)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_such_a_scale_and_spoils_no_other(bad):
    x = torch.ones(3, 2, 20)
    x[1, 0, 17] = bad
    pages, scales = torch.zeros(1, 4, 2, 20, dtype=torch.int8), torch.zeros(1, 4, 2)
    with kernels.using("cpp"):
        store_kv(x, None, pages, None, torch.arange(3), scales)
    assert not scales[0, 1, 0].isfinite()
    scales[0, 1, 0] = 0
    assert scales.isfinite().all()
    assert (pages[0, :3, 1] == 127).all()


def test_keys_only():
    pages = torch.zeros(2, 4, 1, 6)
    with kernels.using("cpp"):
        store_kv(torch.ones(1, 1, 6), None, pages, None, torch.tensor([5]))
    assert pages.flatten(0, 1).sum((1, 2)).tolist() == [0, 0, 0, 0, 0, 6, 0, 0]


@pytest.mark.parametrize("slot", [-1, 12, 2**40])
def test_a_slot_outside_of_the_pages_is_an_error_and_writes_nothing(slot):
    pages = torch.zeros(2, 3, 4, 8, 16).unbind(0)
    with kernels.using("cpp"), pytest.raises(IndexError, match="3 blocks of 4 tokens"):
        kernels.store_kv(torch.ones(2, 8, 16), torch.ones(2, 8, 16), *pages, torch.tensor([0, slot]))
    assert not any(page.any() for page in pages)
