"""The Triton grouped GEMM, interpreted with its production tiles, against float64 and against itself."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import grouped_gemm, registry
from turnout.kernels.configs import FLOAT_TILES, HALF_TILES
from turnout.kernels.triton.grouped_gemm import launch

TILES = {torch.float32: FLOAT_TILES, torch.bfloat16: HALF_TILES}
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
# rows, depth, width, ends
SHAPES = {
    "no rows": (0, 8, 16, [0, 0]),
    "one row": (1, 64, 40, [0, 1, 1]),
    "odd sizes": (37, 13, 7, [5, 5, 30, 37]),
    "several depths and columns": (50, 160, 130, [7, 7, 31, 50]),
    "one hot expert": (150, 48, 24, [0, 150, 150]),
    "an expert a row": (12, 8, 8, list(range(1, 13))),
}


def make(shape, dtype, transposed=False):
    N, K, M, ends = shape
    w = torch.randn(len(ends), M, K, dtype=dtype).mT if transposed else torch.randn(len(ends), K, M, dtype=dtype)
    return torch.randn(N, K, dtype=dtype), w, torch.tensor(ends, dtype=torch.int32)


def row_by_row(x, w, ends):
    owner = torch.searchsorted(ends, torch.arange(x.shape[0]), right=True)
    return torch.einsum("nk,nkm->nm", x.double(), w.double()[owner])


def assert_near(value, truth, dtype):
    assert (value.double() - truth).norm() <= BOUND[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", TILES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward_agree_with_float64(shape, dtype, transposed):
    x, w, ends = make(shape, dtype, transposed)
    x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
    grad = torch.randn(shape[0], shape[2]).to(dtype)
    truth = row_by_row(x64, w64, ends)
    x, w = x.requires_grad_(), w.requires_grad_()
    with kernels.using("triton"):
        assert registry.choose("grouped_gemm", x, w, ends) == "triton"
        y = grouped_gemm(x, w, ends)
    assert y.dtype == dtype
    assert_near(y, truth, dtype)
    truths = torch.autograd.grad(truth, (x64, w64), grad.double())
    for value, exact in zip(torch.autograd.grad(y, (x, w), grad), truths, strict=True):
        assert_near(value, exact, dtype)


@pytest.mark.parametrize(("dtype", "tile"), [(dtype, tile) for dtype, tiles in TILES.items() for _, tile in tiles])
def test_every_tile_of_the_table_is_right(dtype, tile):
    x, w, ends = make((140, 72, 136, [1, 1, 135, 140]), dtype)
    assert_near(launch(x, w, ends, tile), row_by_row(x, w, ends), dtype)


@pytest.mark.parametrize(("dtype", "tile"), [(dtype, tile) for dtype, tiles in TILES.items() for _, tile in tiles])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(dtype, tile):
    x, w, ends = make((40, 160, 64, [4, 25, 40]), dtype)
    together = launch(x, w, ends, tile)
    for row, expert in ((0, 0), (3, 0), (4, 1), (24, 1), (39, 2)):
        alone = torch.tensor([int(e >= expert) for e in range(3)], dtype=torch.int32)
        assert torch.equal(launch(x[row : row + 1], w, alone, tile)[0], together[row])


def test_rows_of_other_experts_and_poison_beyond_the_edges_are_not_read():
    room_x, room_w = torch.full((60, 40), torch.nan), torch.full((3, 40, 40), torch.nan)
    x, w, ends = room_x[5:42, :13], room_w[:, :13, :7], torch.tensor([5, 30, 37], dtype=torch.int32)
    x.normal_()
    w.normal_()
    assert_near(launch(x, w, ends), row_by_row(x, w, ends), torch.float32)


def test_expanded_and_strided_rows_are_addressed_by_their_strides():
    _, w, ends = make((20, 8, 16, [6, 20]), torch.float32)
    for x in (torch.randn(1, 8).expand(20, 8), torch.randn(8, 20).T, torch.randn(20, 16)[:, ::2]):
        assert_near(launch(x, w, ends), row_by_row(x, w, ends), torch.float32)


def test_float64_falls_back_to_the_reference():
    x, w, ends = make((6, 8, 8, [6]), torch.float64)
    with kernels.using("triton"):
        assert registry.choose("grouped_gemm", x, w, ends) == "reference"


@pytest.mark.full
@pytest.mark.parametrize("dtype", TILES)
@pytest.mark.parametrize("experts", [1, 3, 60, 512])
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_shape_grid(rows, experts, dtype):
    ends = torch.randint(0, rows + 1, (experts,)).sort()[0]
    ends[-1] = rows
    x, w, ends = make((rows, 40, 24, ends.tolist()), dtype)
    assert_near(launch(x, w, ends), row_by_row(x, w, ends), dtype)
