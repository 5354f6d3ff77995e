"""Grouped GEMM: a tile map made on the device, then one program a tile. No host synchronisation, no atomics.

N rows, K input width, M output width, E experts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import Tile, grouped_gemm_tile
from ..torch_ops.grouped_gemm import GroupedGemm
from .probe import runs

MAP_BLOCK = 64


@triton.jit
def tile_map_kernel(  # type: ignore[no-untyped-def]
    ends, expert_of, first_of, end_of, experts,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile → its expert, its first row and its expert's end; -1 for tiles past the last."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < experts, other=0)
    start = tl.load(ends + e - 1, mask=(e < experts) & (e > 0), other=0)
    tiles = (end - start + ROWS - 1) // ROWS
    after = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = tile[:, None] - (after - tiles)[None, :]
    mine = (within >= 0) & (within < tiles[None, :])
    tl.store(expert_of + tile, tl.sum(tl.where(mine, e[None, :] + 1, 0), 1) - 1)
    tl.store(first_of + tile, tl.sum(tl.where(mine, start[None, :] + within * ROWS, 0), 1))
    tl.store(end_of + tile, tl.sum(tl.where(mine, end[None, :], 0), 1))


@triton.jit
def grouped_gemm_kernel(  # type: ignore[no-untyped-def]
    x, w, y, expert_of, first_of, end_of, K, M,
    x_row, x_k, w_expert, w_k, w_column, y_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y[rows, columns] of one tile; neighbouring programs share the rows. EVEN: DEPTH divides K."""
    blocks = tl.cdiv(M, COLUMNS)
    tile = tl.program_id(0) // blocks
    expert = tl.load(expert_of + tile)
    if expert < 0:
        return
    row = tl.load(first_of + tile) + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    row_ok, column_ok = row < tl.load(end_of + tile), column < M
    x_at = x + row.to(tl.int64)[:, None] * x_row + k[None, :] * x_k
    w_at = w + expert.to(tl.int64) * w_expert + k[:, None] * w_k + column[None, :] * w_column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, K, DEPTH):
        if EVEN:
            x_tile = tl.load(x_at, mask=row_ok[:, None], other=0.0)
            w_tile = tl.load(w_at, mask=column_ok[None, :], other=0.0)
        else:
            k_ok = k < K - done
            x_tile = tl.load(x_at, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            w_tile = tl.load(w_at, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
        x_at += DEPTH * x_k
        w_at += DEPTH * w_k
    y_at = y + row.to(tl.int64)[:, None] * y_row + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def grouped_gemm_fits(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> bool:
    return runs(x_NK) and x_NK.dtype == w_EKM.dtype


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    return GroupedGemm.apply(x_NK, w_EKM, ends_E, launch)


def launch(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor, tile: Tile | None = None) -> Tensor:
    """The forward pass, with the tile of the table unless one is given."""
    tile = tile or grouped_gemm_tile(len(x_NK), len(w_EKM), x_NK.element_size())
    return product(x_NK, w_EKM, tile_map(ends_E, len(x_NK), tile.rows), tile)


@dataclass(frozen=True)
class TileMap:
    """Tile → its expert (-1 past the last tile), its first row and its expert's end; `most` is a bound on the tiles."""

    most: int
    expert_of: Tensor
    first_of: Tensor
    end_of: Tensor

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.expert_of, self.first_of, self.end_of


def tile_map(ends_E: Tensor, rows: int, tile_rows: int) -> TileMap:
    """The tiles of at most `rows` rows. Each expert pads less than a tile, so nothing need be asked of the device."""
    E = len(ends_E)
    most = triton.cdiv(rows, tile_rows) + min(rows, E)
    programs = triton.cdiv(most, MAP_BLOCK)
    tiles = torch.empty(3, programs * MAP_BLOCK, dtype=torch.int32, device=ends_E.device).unbind(0)
    if programs:
        tile_map_kernel[(programs,)](ends_E, *tiles, E, triton.next_power_of_2(E), tile_rows, MAP_BLOCK)
    return TileMap(most, *tiles)


def product(x_NK: Tensor, w_EKM: Tensor, tiles: TileMap, tile: Tile) -> Tensor:
    """y[n] = x[n] @ w[e] for the rows that are in a tile; the others are left as they are."""
    K, M = w_EKM.shape[1:]
    y_NM = x_NK.new_empty(len(x_NK), M)
    if y_NM.numel():
        grouped_gemm_kernel[(tiles.most * triton.cdiv(M, tile.columns),)](
            x_NK, w_EKM, y_NM, *tiles.columns, K, M,
            *x_NK.stride(), *w_EKM.stride(), y_NM.stride(0),
            tile.rows, tile.columns, tile.depth, K % tile.depth == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y_NM
