"""Grouped GEMM: a tile map made on the device, then one program a tile. No host synchronisation, no atomics.

N rows, K input width, M output width, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import Tile, grouped_gemm_tile
from ..torch_ops.grouped_gemm import GroupedGemm
from . import interpreter

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
    """On a GPU, or interpreted by the corrected interpreter; no float64."""
    runs = x_NK.is_cuda or interpreter.active()
    return runs and x_NK.dtype in (torch.float32, torch.bfloat16, torch.float16) and x_NK.dtype == w_EKM.dtype


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    return GroupedGemm.apply(x_NK, w_EKM, ends_E, launch)


def launch(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor, tile: Tile | None = None) -> Tensor:
    """The forward pass, with the tile of the table unless one is given."""
    N, K = x_NK.shape
    E, _, M = w_EKM.shape
    y_NM = x_NK.new_empty(N, M)
    if y_NM.numel() == 0:
        return y_NM
    tile = tile or grouped_gemm_tile(N, E, x_NK.element_size())
    most = triton.cdiv(N, tile.rows) + min(N, E)  # known without asking the device: each expert pads less than a tile
    programs = triton.cdiv(most, MAP_BLOCK)
    tiles = torch.empty(3, programs * MAP_BLOCK, dtype=torch.int32, device=x_NK.device).unbind(0)
    tile_map_kernel[(programs,)](ends_E, *tiles, E, triton.next_power_of_2(E), tile.rows, MAP_BLOCK)
    grouped_gemm_kernel[(most * triton.cdiv(M, tile.columns),)](
        x_NK, w_EKM, y_NM, *tiles, K, M,
        *x_NK.stride(), *w_EKM.stride(), y_NM.stride(0),
        tile.rows, tile.columns, tile.depth, K % tile.depth == 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_NM
