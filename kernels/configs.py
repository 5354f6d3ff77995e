"""The tile sizes of every GPU kernel: the one place where they are chosen, by explicit rule, never by autotuning.

DEPTH is the same for all tiles of a dtype, so that a row's products are added in the same order however many rows
share its launch. `python -m turnout.kernels.compile_check` holds that each tile fits an sm_90 GPU without spilling.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One program's share of a matrix product: `rows` x `columns` of the result, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# rows an expert has on average, up to which the tile is used (the last has no bound)
HALF_TILES = (
    (32, Tile(rows=16, columns=128, depth=64, warps=4, stages=4)),
    (96, Tile(rows=64, columns=128, depth=64, warps=4, stages=4)),
    (0, Tile(rows=128, columns=128, depth=64, warps=8, stages=4)),
)
FLOAT_TILES = (
    (32, Tile(rows=16, columns=64, depth=32, warps=4, stages=3)),
    (0, Tile(rows=64, columns=64, depth=32, warps=8, stages=3)),
)


def grouped_gemm_tile(rows: int, experts: int, element_size: int) -> Tile:
    """The tile for a grouped GEMM of `rows` rows in all, with 2- or 4-byte operands."""
    mean = -(-rows // experts)
    tiles = HALF_TILES if element_size == 2 else FLOAT_TILES
    return next(tile for bound, tile in tiles if mean <= bound or not bound)


def row_columns(width: int, most: int = 1024) -> int:
    """Columns of a row that a program which walks over rows takes at a time: a power of two, up to `most`."""
    return min(most, max(16, 1 << (width - 1).bit_length()))
