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


QUANTIZED_GROUP_TILES = (HALF_TILES[0], (0, HALF_TILES[1][1]))  # a second tile of accumulators, scales and zero points
QUANTIZED_FLOAT_TILES = ((0, Tile(rows=16, columns=32, depth=64, warps=4, stages=3)),)


def quantized_tile(rows: int, experts: int, element_size: int, grouped: bool) -> Tile:
    """The tile for `rows` rows in all of 1, 2 or 4 bytes a number that meet weights of few bits."""
    mean = -(-rows // experts)
    tiles = QUANTIZED_FLOAT_TILES if element_size == 4 else QUANTIZED_GROUP_TILES if grouped else HALF_TILES
    return next(tile for bound, tile in tiles if mean <= bound or not bound)


def grouped_gemm_tile(rows: int, experts: int, element_size: int) -> Tile:
    """The tile for a grouped GEMM of `rows` rows in all, with 2- or 4-byte operands."""
    mean = -(-rows // experts)
    tiles = HALF_TILES if element_size == 2 else FLOAT_TILES
    return next(tile for bound, tile in tiles if mean <= bound or not bound)


@dataclass(frozen=True, kw_only=True)
class ExpertTiles:
    """The tiles of a layer of experts, all of one number of rows, so that one tile map serves them.

    Args:
        up: of the gate and, as large, of the up projection.
        down: of the products whose result is written as it is.
        back: of the hidden gradients, whose program also keeps the activations' tiles.
    """

    up: Tile
    down: Tile
    back: Tile


# rows an expert has on average, up to which the tiles are used (the last have no bound)
EXPERT_HALF_TILES = (
    (
        32,
        ExpertTiles(
            up=Tile(rows=16, columns=64, depth=64, warps=4, stages=4),
            down=HALF_TILES[0][1],
            back=Tile(rows=16, columns=64, depth=64, warps=4, stages=4),
        ),
    ),
    (
        96,
        ExpertTiles(
            up=Tile(rows=64, columns=64, depth=64, warps=4, stages=4),
            down=HALF_TILES[1][1],
            back=Tile(rows=64, columns=64, depth=64, warps=4, stages=4),
        ),
    ),
    (
        0,
        ExpertTiles(
            up=Tile(rows=128, columns=64, depth=64, warps=8, stages=4),
            down=HALF_TILES[2][1],
            back=Tile(rows=128, columns=64, depth=64, warps=8, stages=4),
        ),
    ),
)
EXPERT_FLOAT_TILES = (
    (32, ExpertTiles(up=FLOAT_TILES[0][1], down=FLOAT_TILES[0][1], back=FLOAT_TILES[0][1])),
    (0, ExpertTiles(up=FLOAT_TILES[1][1], down=FLOAT_TILES[1][1], back=FLOAT_TILES[1][1])),
)
# of weight gradients: `rows` x `columns` of a matrix, `depth` of an expert's rows at a time
WEIGHT_HALF_TILE = Tile(rows=128, columns=128, depth=64, warps=8, stages=3)
WEIGHT_FLOAT_TILE = Tile(rows=64, columns=64, depth=32, warps=8, stages=3)
# of the few-token form: `rows` hidden columns a program, `columns` of the width at a time
FEW_TILE = Tile(rows=16, columns=256, depth=1, warps=4, stages=3)
MOST_FEW = 64  # assignments


def expert_tiles(rows: int, experts: int, element_size: int) -> ExpertTiles:
    """The tiles for a layer of experts with `rows` rows in all, with 2- or 4-byte operands."""
    mean = -(-rows // experts)
    tiles = EXPERT_HALF_TILES if element_size == 2 else EXPERT_FLOAT_TILES
    return next(tile for bound, tile in tiles if mean <= bound or not bound)


def weight_tile(element_size: int) -> Tile:
    """The tile for the weight gradients, with 2- or 4-byte operands."""
    return WEIGHT_HALF_TILE if element_size == 2 else WEIGHT_FLOAT_TILE


def few(tokens: int, choices: int, experts: int) -> bool:
    """Whether so few assignments hardly share an expert, so that each may read its own weights."""
    return tokens == 1 or tokens * choices <= min(MOST_FEW, experts // 4)


@dataclass(frozen=True, kw_only=True)
class AttentionTile:
    """`rows` queries' heads against `keys` keys at a time, in chunks of `chunk` keys.

    Keys and chunks depend on the head's width and the dtype alone, so that a query's sums have one order.
    """

    rows: int
    keys: int
    chunk: int
    warps: int
    stages: int


CHUNK = 512  # keys
PROGRAMS = 264  # two for each of an H200's multiprocessors: with fewer, long contexts are divided among programs
# of heads up to this wide (the last has no bound): the tile for few rows, then that for many
ATTENTION_HALF_TILES = (
    (
        128,
        AttentionTile(rows=16, keys=64, chunk=CHUNK, warps=4, stages=3),
        AttentionTile(rows=64, keys=64, chunk=CHUNK, warps=8, stages=3),
    ),
    (
        256,
        AttentionTile(rows=16, keys=32, chunk=CHUNK, warps=4, stages=2),
        AttentionTile(rows=64, keys=32, chunk=CHUNK, warps=8, stages=2),
    ),
    (
        0,
        AttentionTile(rows=16, keys=32, chunk=CHUNK, warps=8, stages=2),
        AttentionTile(rows=16, keys=32, chunk=CHUNK, warps=8, stages=2),
    ),
)
ATTENTION_FLOAT_TILES = (
    (
        128,
        AttentionTile(rows=16, keys=16, chunk=CHUNK, warps=4, stages=2),
        AttentionTile(rows=32, keys=16, chunk=CHUNK, warps=8, stages=2),
    ),
    (
        0,
        AttentionTile(rows=16, keys=16, chunk=CHUNK, warps=8, stages=1),
        AttentionTile(rows=16, keys=16, chunk=CHUNK, warps=8, stages=1),
    ),
)


def attention_tile(rows: int, width: int, element_size: int) -> AttentionTile:
    """The tile for heads of `width` with `rows` rows a sequence and group on average, with 2- or 4-byte operands."""
    tiles = ATTENTION_HALF_TILES if element_size == 2 else ATTENTION_FLOAT_TILES
    low, high = next((low, high) for bound, low, high in tiles if width <= bound or not bound)
    return low if rows <= low.rows else high


# of heads up to this wide: `rows` queries' heads and `keys` keys of the backward pass
ATTENTION_BACK_HALF_TILES = (
    (128, AttentionTile(rows=64, keys=32, chunk=CHUNK, warps=8, stages=2)),
    (256, AttentionTile(rows=32, keys=32, chunk=CHUNK, warps=8, stages=1)),
)
ATTENTION_BACK_FLOAT_TILES = (
    (128, AttentionTile(rows=16, keys=16, chunk=CHUNK, warps=4, stages=1)),
    (256, AttentionTile(rows=16, keys=16, chunk=CHUNK, warps=8, stages=1)),
)
MOST_BACK = 256  # numbers of a head that learns


def attention_back_tile(width: int, element_size: int) -> AttentionTile:
    """The tile of the backward pass for heads of `width`, with 2- or 4-byte operands."""
    tiles = ATTENTION_BACK_HALF_TILES if element_size == 2 else ATTENTION_BACK_FLOAT_TILES
    return next(tile for bound, tile in tiles if width <= bound)


def halves(width: int) -> tuple[int, int]:
    """A row in two powers of two, the greatest that is in it and one that holds the rest (0 if there is none)."""
    main = max(16, 1 << (width.bit_length() - 1))
    return main, 0 if width <= main else max(16, 1 << (width - main - 1).bit_length())


def row_columns(width: int, most: int = 1024) -> int:
    """Columns of a row that a program which walks over rows takes at a time: a power of two, up to `most`."""
    return min(most, max(16, 1 << (width - 1).bit_length()))


def row_warps(width: int) -> int:
    """Warps of a program that holds a whole row: each thread has about sixteen numbers."""
    return min(16, max(1, width // 512))


MOST_EXPERTS = 1024  # of a router whose rows a program holds whole


def gate_rows(width: int) -> tuple[int, int]:
    """Rows and warps of a program that decides for whole rows of `width` experts: each thread has eight numbers."""
    return max(1, 1024 // width), 4


SAMPLE_WARPS = 16  # of a program that draws from a row


def sample_columns(vocabulary: int) -> int:
    """Probabilities that are compared with several numbers at once: two a thread."""
    return row_columns(vocabulary, 1024)
