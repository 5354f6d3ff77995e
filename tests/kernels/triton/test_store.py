"""Keys and values are stored as the reference stores them, bit by bit."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry, store_kv

BLOCKS, SIZE = 4, 8


def check(T, G, D, V, dtype, cache_dtype, values=True):
    slots = torch.randperm(BLOCKS * SIZE)[:T]
    room = torch.randn(T, G, D + V).to(dtype)  # strided, as a projection's output is
    k, v = room[..., :D], room[..., D:] if values else None
    if T > 2:
        k[0] = 0
        k[1, 0, 0] = torch.inf
        k[2, :, 0] = torch.nan if cache_dtype != torch.int8 else 1000
    quantised = cache_dtype == torch.int8
    results = []
    for form in ("triton", "reference"):
        caches = [torch.zeros(BLOCKS, SIZE, G, width, dtype=cache_dtype) for width in (D, V)]
        scales = [torch.zeros(BLOCKS, SIZE, G) if quantised else None for _ in caches]
        args = (k, v, caches[0], caches[1] if values else None, slots, *(scales if quantised else ()))
        with kernels.using(form):
            assert registry.choose("store_kv", *args) == form
            store_kv(*args)
        results.append([t for t in (*caches, *scales) if t is not None])
    for number, (value, truth) in enumerate(zip(*results, strict=True)):
        if quantised and T > 2 and number == 0:  # a row that is not finite has such a scale; its numbers mean nothing
            value.view(-1, G, D)[slots[1], 0], truth.view(-1, G, D)[slots[1], 0] = 0, 0
        assert torch.equal(value.nan_to_num(), truth.nan_to_num())
        assert torch.equal(value.isnan(), truth.isnan())


def test_rows_are_cast_or_quantised_as_by_the_reference():
    check(5, 2, 24, 16, torch.bfloat16, torch.bfloat16)
    check(7, 2, 24, 16, torch.bfloat16, torch.int8)


def test_a_row_with_a_nan_has_a_scale_of_nan():
    k = torch.randn(1, 1, 8).index_fill(2, torch.tensor([3]), torch.nan)
    pages, scales = torch.zeros(1, 1, 1, 8, dtype=torch.int8), torch.zeros(1, 1, 1)
    with kernels.using("triton"):
        store_kv(k, None, pages, None, torch.tensor([0]), scales)
    assert scales.isnan().all()


@pytest.mark.full
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "G", "D", "V"), [(0, 1, 8, 8), (1, 1, 1, 1), (9, 3, 17, 16), (20, 1, 576, 4)])
def test_grid(T, G, D, V, dtype, cache_dtype, values):
    check(T, G, D, V, dtype, cache_dtype, values)
