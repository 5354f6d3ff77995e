"""Every production kernel with the types, constants and tiles with which it is launched, for `compile_check`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .configs import FLOAT_TILES, HALF_TILES, Tile, row_columns
from .triton import combine, grouped_gemm, route

HGMMA_ROWS = 64  # from here on a half-precision tile must use the warpgroup instruction
_ROWS = Tile(rows=1, columns=1, depth=1, warps=4, stages=3)  # of kernels that walk over rows: Triton's own options
_WIDTH, _EXPERTS = 2048, 512


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel as it is launched: argument types, constants and options."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    tile: Tile
    hgmma: bool


def cases() -> Iterator[Case]:
    """Every tile of the tables, with both layouts of the weights where a kernel takes both."""
    for dtype, tiles in (("bf16", HALF_TILES), ("fp16", HALF_TILES[-1:]), ("fp32", FLOAT_TILES)):
        for _, tile in tiles:
            for contiguous in ("w_column", "w_k"):
                yield _grouped_gemm(dtype, tile, contiguous)
    yield _case(
        "tile_map 512", grouped_gemm.tile_map_kernel,
        dict.fromkeys(("ends", "expert_of", "first_of", "end_of"), "*i32"),
        {"EXPERTS": _EXPERTS, "ROWS": 128, "BLOCK": grouped_gemm.MAP_BLOCK},
    )  # fmt: skip
    yield from _routing()


def _case(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: Tile = _ROWS, hgmma: bool = False
) -> Case:
    """Arguments that are neither typed nor constant are int32 numbers."""
    kinds = types | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
    return Case(name=name, kernel=kernel, signature=signature, constants=constants, tile=tile, hgmma=hgmma)


def _grouped_gemm(dtype: str, tile: Tile, contiguous: str) -> Case:
    constants: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "EVEN": True}
    constants |= {"x_k": 1, contiguous: 1}
    types = dict.fromkeys(("x", "w", "y"), f"*{dtype}") | dict.fromkeys(("expert_of", "first_of", "end_of"), "*i32")
    name = f"grouped_gemm {dtype} {tile.rows}x{tile.columns}x{tile.depth} {contiguous}"
    return _case(name, grouped_gemm.grouped_gemm_kernel, types, constants, tile, _tensor_cores(dtype, tile))


def _tensor_cores(dtype: str, tile: Tile) -> bool:
    return dtype != "fp32" and tile.rows >= HGMMA_ROWS


def _routing() -> Iterator[Case]:
    ids = {"ids": "*i64", "kept": "*u8", "order": "*i32", "slots": "*i32"}
    block = {"BLOCK": route.BLOCK}
    yield _case("count 512", route.count_kernel, ids | {"counts": "*i32"}, block | {"BINS": _EXPERTS})
    yield _case("place", route.place_kernel, ids | {"scanned": "*i32"}, block)
    columns = {"COLUMNS": row_columns(_WIDTH)}
    rows = ids | dict.fromkeys(("x", "y", "out", "rows", "grad", "grad_y"), "*bf16")
    rows |= dict.fromkeys(("weights", "grad_weights"), "*fp32")
    yield _case("fetch", combine.fetch_kernel, rows, columns)
    yield _case("gather_sum", combine.gather_sum_kernel, rows, columns | {"weights": None})
    yield _case("gather_sum weighted", combine.gather_sum_kernel, rows, columns)
    yield _case("combine_backward", combine.combine_backward_kernel, rows, columns)
