"""Every production kernel with the types, constants and tiles with which it is launched, for `compile_check`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .configs import (
    EXPERT_FLOAT_TILES,
    EXPERT_HALF_TILES,
    FEW_TILE,
    FLOAT_TILES,
    HALF_TILES,
    Tile,
    row_columns,
    weight_tile,
)
from .triton import combine, decode_experts, experts, experts_backward, grouped_gemm, route

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
    yield from _experts()
    yield from _few_tokens()


def _case(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: Tile = _ROWS, hgmma: bool = False
) -> Case:
    """Arguments that are neither typed nor constant are int32 numbers."""
    kinds = types | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
    return Case(name=name, kernel=kernel, signature=signature, constants=constants, tile=tile, hgmma=hgmma)


def _tiled(name: str, kernel: Any, types: dict[str, str], tile: Tile, constants: dict[str, Any]) -> Case:
    """A matrix product: its operands' type is in the name, its tile joins it."""
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    name = f"{name} {tile.rows}x{tile.columns}x{tile.depth}"
    return _case(name, kernel, types, sizes | constants, tile, "fp32" not in name and tile.rows >= HGMMA_ROWS)


def _grouped_gemm(dtype: str, tile: Tile, contiguous: str) -> Case:
    types = dict.fromkeys(("x", "w", "y"), f"*{dtype}") | dict.fromkeys(("expert_of", "first_of", "end_of"), "*i32")
    case = _tiled(
        f"grouped_gemm {dtype}", grouped_gemm.grouped_gemm_kernel, types, tile, {"EVEN": True, "x_k": 1, contiguous: 1}
    )
    return replace(case, name=f"{case.name} {contiguous}")


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


def _experts() -> Iterator[Case]:
    """The weights as a checkpoint has them, with and without what the backward pass needs."""
    for dtype, table in (("bf16", EXPERT_HALF_TILES), ("fp32", EXPERT_FLOAT_TILES)):
        types = dict.fromkeys(("order", "slots", "ends", "expert_of", "first_of", "end_of"), "*i32")
        types |= dict.fromkeys(("x", "w", "h", "z", "grad", "grad_z", "scaled", "left", "right", "out"), f"*{dtype}")
        types |= dict.fromkeys(("weights", "dots", "grad_weights"), "*fp32")
        for _, tiles in table:
            even = {"EVEN": True, "w_k": 1}
            yield _tiled(f"up training {dtype}", experts.up_kernel, types, tiles.up, even | {"x_k": 1})
            yield _tiled(f"up {dtype}", experts.up_kernel, types, tiles.up, even | {"x_k": 1, "z": None})
            back = experts_backward.hidden_grad_kernel
            yield _tiled(f"hidden_grad {dtype}", back, types, tiles.back, even | {"grad_k": 1})
        tile = weight_tile(2 if dtype == "bf16" else 4)
        yield _tiled(f"weight_grad {dtype}", experts_backward.weight_grad_kernel, types, tile, {"right_column": 1})
    yield _case("dots", experts_backward.dots_kernel, types, {"LINE": experts_backward.LINE})


def _few_tokens() -> Iterator[Case]:
    types = {"ids": "*i64", "kept": "*u8", "parts": "*fp32", "weights": "*fp32"}
    for dtype in ("bf16", "fp32"):
        types |= dict.fromkeys(("x", "w_in", "w_out", "out"), f"*{dtype}")
        constants = {"SLICE": FEW_TILE.rows, "COLUMNS": FEW_TILE.columns, "x_k": 1, "in_k": 1, "out_column": 1}
        yield _case(f"slice {dtype}", decode_experts.slice_kernel, types, constants | {"kept": None}, FEW_TILE)
        yield _case(f"slice dropping {dtype}", decode_experts.slice_kernel, types, constants, FEW_TILE)
        columns = {"COLUMNS": row_columns(_WIDTH)}
        yield _case(f"slice_sum {dtype}", decode_experts.slice_sum_kernel, types, columns | {"kept": None})
