"""Every production kernel with the types, constants and tiles with which it is launched, for `compile_check`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .configs import (
    ATTENTION_FLOAT_TILES,
    ATTENTION_HALF_TILES,
    EXPERT_FLOAT_TILES,
    EXPERT_HALF_TILES,
    FEW_TILE,
    FLOAT_TILES,
    HALF_TILES,
    QUANTIZED_FLOAT_TILES,
    QUANTIZED_GROUP_TILES,
    SAMPLE_WARPS,
    AttentionTile,
    Tile,
    attention_back_tile,
    gate_rows,
    halves,
    row_columns,
    row_warps,
    sample_columns,
    weight_tile,
)
from .triton import (
    attention,
    combine,
    decode_experts,
    experts,
    experts_backward,
    gates,
    grouped_gemm,
    heads,
    norm,
    quantized,
    route,
    sample,
    squares,
    store,
    varlen,
)

HGMMA_ROWS = 64  # from here on a half-precision tile must use the warpgroup instruction
_ROWS = Tile(rows=1, columns=1, depth=1, warps=4, stages=3)  # of kernels that walk over rows: Triton's own options
_WIDTH, _EXPERTS, _VOCABULARY = 2048, 512, 150_000


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
    yield from _attention()
    yield from _store()
    yield from _elements()
    yield from _gates()
    yield _sample()
    yield from _quantized()


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


def _attention() -> Iterator[Case]:
    """Heads of 128 and 256 numbers, latent ones of 576; one program a query, and one a chunk; pages of int8."""
    for dtype, table, widths in (
        ("bf16", ATTENTION_HALF_TILES, (128, 256, 576)),
        ("fp32", ATTENTION_FLOAT_TILES, (128, 576)),
    ):
        for width, (_, low, high) in zip(widths, table, strict=True):
            latent = width == 576
            yield _attend(dtype, width, low, {"SPLIT": True, "LATENT": latent})
            yield _attend(dtype, width, high, {"SPLIT": False, "LATENT": latent})
    few, many = ATTENTION_HALF_TILES[0][1:]
    yield _attend("bf16 int8", 128, few, {"SPLIT": True, "LATENT": False})
    yield _attend("bf16 learned", 128, many, {"SPLIT": False, "LATENT": False})
    yield _attend("bf16 packed", 128, many, {"SPLIT": False, "LATENT": False})
    for dtype, width, value in (
        ("bf16", 128, 128),
        ("bf16", 192, 128),
        ("bf16", 256, 256),
        ("fp32", 128, 128),
        ("fp32", 256, 256),
    ):
        yield from _attend_back(dtype, width, value)
    types = dict.fromkeys(("parts", "tops", "totals", "sinks"), "*fp32") | {"out": "*bf16"}
    yield _case("merge", attention.merge_kernel, types, {"WIDTH": 512, "LOG2E": attention.LOG2E})


def _attend(kind: str, width: int, tile: AttentionTile, switches: dict[str, Any]) -> Case:
    dtype, *special = kind.split()
    value = 512 if switches["LATENT"] else width
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict.fromkeys(("tables", "cu_q"), "*i32")
    types |= dict.fromkeys(("tops", "totals"), "*fp32" if switches["SPLIT"] else f"*{dtype}")
    types |= {"contexts": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("sinks", "bias", "scales_k", "scales_v", "norms"), "*fp32")
    absent = {"sinks", "bias", "window", "scales_k", "scales_v", "norms"}
    if "int8" in special:
        types |= {"k": "*i8", "v": "*i8"}
        absent -= {"scales_k", "scales_v"}
    if "learned" in special:
        absent -= {"sinks", "bias", "window"}
    if "packed" in special:
        absent |= {"tables"}
        absent -= {"norms"}
    if switches["SPLIT"]:
        types["out"] = "*fp32"
    main, rest = halves(width)
    constants = dict.fromkeys(absent) | switches | {"CAUSAL": True, "LOG2E": attention.LOG2E, "SIZE": 16}
    constants |= {"ROWS": tile.rows, "HEADS": 8, "KEYS": tile.keys, "CHUNK": tile.chunk}
    constants |= {"MAIN": main, "REST": rest, "WIDTH": value}
    name = f"attention {kind} {width} {tile.rows}x{tile.keys}{' split' * switches['SPLIT']}"
    options = Tile(rows=tile.rows, columns=tile.keys, depth=1, warps=tile.warps, stages=tile.stages)
    return _case(
        name, attention.attention_kernel, types, constants, options, dtype != "fp32" and tile.rows >= HGMMA_ROWS
    )


def _attend_back(dtype: str, width: int, value: int) -> Iterator[Case]:
    tile, (main, rest) = attention_back_tile(width, 2 if dtype == "bf16" else 4), halves(width)
    types = dict.fromkeys(("q", "k", "v", "grad", "out", "out_k", "out_v"), f"*{dtype}") | {"scale": "fp32"}
    types |= dict.fromkeys(("norms", "deltas"), "*fp32") | dict.fromkeys(("cu_q", "cu_k"), "*i32")
    constants: dict[str, Any] = {
        "ROWS": tile.rows,
        "HEADS": 8,
        "KEYS": tile.keys,
        "MAIN": main,
        "REST": rest,
        "WIDTH": value,
    }
    constants |= {"CAUSAL": True, "LOG2E": attention.LOG2E, "bias": None, "window": None}
    options = Tile(rows=tile.rows, columns=tile.keys, depth=1, warps=tile.warps, stages=tile.stages)
    hgmma = dtype == "bf16" and tile.rows >= HGMMA_ROWS
    for kernel in (varlen.query_grad_kernel, varlen.key_grad_kernel):
        yield _case(f"{kernel.__name__} {dtype} {width}", kernel, types, constants, options, hgmma)
    if dtype == "bf16":
        yield _case(f"deltas {value}", varlen.deltas_kernel, types, {"WIDTH": value})


def _store() -> Iterator[Case]:
    types = {"slots": "*i64", "k": "*bf16", "v": "*bf16", "scales_k": "*fp32", "scales_v": "*fp32"}
    widths = {"WIDTH_K": 256, "WIDTH_V": 256, "ROUND": store.ROUND}
    pages = dict.fromkeys(("cache_k", "cache_v"), "*bf16")
    yield _case("store bf16", store.store_kernel, types | pages, widths | {"scales_k": None, "scales_v": None})
    pages = dict.fromkeys(("cache_k", "cache_v"), "*i8")
    yield _case("store int8", store.store_kernel, types | pages, widths)


def _elements() -> Iterator[Case]:
    names = ("x", "weight", "out", "grad", "grad_x", "gate_up", "logits")
    types = dict.fromkeys(names, "*bf16") | {"eps": "fp32", "targets": "*i64"}
    types |= dict.fromkeys(("parts", "cosines", "sines", "losses", "norms"), "*fp32")
    for width in (_WIDTH, norm.MOST):
        line = replace(_ROWS, warps=row_warps(width))
        sums = types | {"y": "*bf16", "total": "*bf16"}
        yield _case(f"add_rms_norm {width}", norm.add_rms_norm_kernel, sums, {"WIDTH": width}, line)
        yield _case(f"rms_norm {width}", norm.rms_norm_kernel, types, {"WIDTH": width}, line)
        constants = {"WIDTH": width, "LINES": norm.LINES}
        yield _case(f"rms_norm_backward {width}", norm.rms_norm_backward_kernel, types, constants, line)
    turn = {"HALF": 64, "BACK": False}
    yield _case("rope", norm.rope_kernel, types, turn, replace(_ROWS, warps=row_warps(64)))
    columns = {"COLUMNS": row_columns(_WIDTH)}
    yield _case("swiglu", norm.swiglu_kernel, types, columns)
    yield _case("swiglu_backward", norm.swiglu_backward_kernel, types, columns)
    for kind in ("fp32", "bf16"):
        sizes = {"COLUMNS": squares.COLUMNS, "PART": squares.PART}
        yield _case(f"square_sum {kind}", squares.square_sum_kernel, {"x": f"*{kind}", "parts": "*fp64"}, sizes)
    columns = {"COLUMNS": heads.COLUMNS}
    yield _case("cross_entropy", heads.cross_entropy_kernel, types, columns)
    yield _case("cross_entropy_backward", heads.cross_entropy_backward_kernel, types | {"grad": "*fp32"}, columns)


def _gates() -> Iterator[Case]:
    """A softmax over few and over many experts, the sigmoids of DeepSeek-V3, and their gradients."""
    types = dict.fromkeys(("logits", "sigmoids", "bias", "weights", "grad", "out", "scale"), "fp32")
    types = {name: kind if name == "scale" else f"*{kind}" for name, kind in types.items()} | {"ids": "*i64"}
    for score, width, choices, bins in (("softmax", 128, 8, 1), ("softmax", _EXPERTS, 16, 1), ("sigmoid", 256, 8, 8)):
        rows, warps = gate_rows(width)
        options = replace(_ROWS, warps=warps)
        sizes = {"ROWS": rows, "WIDTH": width, "CHOICES": choices, "SCORE": score}
        absent = {"given": None} if score == "sigmoid" else {"given": None, "sigmoids": None, "bias": None}
        constants = sizes | absent | {"BINS": bins, "NEVER": gates.NEVER, "RENORMALIZE": score == "sigmoid"}
        yield _case(f"gates {score} {width}", gates.gates_kernel, types, constants, options)
        constants = sizes | {"RENORMALIZE": score == "sigmoid"}
        yield _case(f"gates_backward {score} {width}", gates.gates_backward_kernel, types, constants, options)


def _sample() -> Case:
    types = dict.fromkeys(("seeds", "choices", "positions", "ids", "top_k"), "*i64") | {"scores": "*fp32"}
    types |= {"probs": "*fp32"} | dict.fromkeys(("temperature", "top_p", "min_p"), "*fp64")
    constants: dict[str, Any] = {"COLUMNS": sample_columns(_VOCABULARY), "WIDE": row_columns(_VOCABULARY, 2048)}
    constants |= {"PIVOTS": sample.PIVOTS, "GREEDY": sample.GREEDY, "TINY": sample.TINY, "PURPOSE": sample.SAMPLE}
    return _case("sample", sample.sample_kernel, types, constants, replace(_ROWS, warps=SAMPLE_WARPS))


def _quantized() -> Iterator[Case]:
    kinds: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("8", "*i8", {"BITS": 8, "FLOAT": False, "GROUPED": False, "w_zeros": None}),
        ("8 zeros", "*i8", {"BITS": 8, "FLOAT": False, "GROUPED": False}),
        ("8 groups", "*i8", {"BITS": 8, "FLOAT": False, "GROUPED": True}),
        ("4", "*u8", {"BITS": 4, "FLOAT": False, "GROUPED": True, "w_zeros": None}),
        ("4 zeros", "*u8", {"BITS": 4, "FLOAT": False, "GROUPED": True}),
        ("e4m3", "*u8", {"BITS": 8, "FLOAT": True, "GROUPED": False, "w_zeros": None}),
    )
    types = dict.fromkeys(("order", "expert_of", "first_of", "end_of"), "*i32") | {"y": "*bf16", "bias": "*bf16"}
    types |= dict.fromkeys(("scales", "w_scales", "w_zeros"), "*fp32")
    for x in ("bf16", "i8", "fp32"):
        for name, weight, constants in kinds[:5] if x == "i8" else kinds:
            half = QUANTIZED_GROUP_TILES if constants["GROUPED"] else HALF_TILES
            for _, tile in QUANTIZED_FLOAT_TILES if x == "fp32" else half:
                known = constants | ({"WHOLE": True} if x == "i8" else {"WHOLE": False, "scales": None})
                of = types | {"x": f"*{x}", "w": weight}
                case = _tiled(f"quantized {name} {x}", quantized.quantized_kernel, of, tile, known)
                yield replace(case, hgmma=case.hgmma and x == "bf16")
    constants = {"COLUMNS": row_columns(_WIDTH), "ROUND": quantized.ROUND}
    yield _case("round_rows", quantized.round_rows_kernel, {"x": "*bf16", "q": "*i8", "scales": "*fp32"}, constants)
