"""Products with weights of eight or four bits, which are widened in registers to the type of the rows they meet.

Rows that are to be rounded to eight bits are, by a kernel of their own: whole numbers times whole numbers, added up
exactly by tensor cores. The sums of the numbers that share a scale are added up in float32.

T tokens, K choices, P = T·K assignments, N rows, D input width, F output width, H = 2F of a gate and an up
projection, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import Tile, quantized_tile, row_columns
from ..quantized import BLOCK, LEAST, QuantizedWeight
from .combine import gather_sum
from .grouped_gemm import TileMap, tile_map
from .norm import swiglu
from .probe import FLOATS, runs
from .route import route
from .store import ROUND


@triton.jit
def round_rows_kernel(  # type: ignore[no-untyped-def]
    x, q, scales, D, x_row, COLUMNS: tl.constexpr, ROUND: tl.constexpr, LEAST: tl.constexpr
):
    """One row as whole numbers within ±127 and its scale: NaN if it is not finite."""
    row = tl.program_id(0).to(tl.int64)
    most, broken = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.int32)
    for start in range(0, D, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        value = tl.abs(tl.load(x + row * x_row + at, mask=at < D, other=0.0).to(tl.float32))
        broken |= ((value < float("inf")) == 0).to(tl.int32)
        most = tl.maximum(most, value)
    sound = tl.sum(broken, 0) == 0
    highest = tl.where(sound, tl.max(most, 0), 0.0)
    turn = tl.where(highest > LEAST, tl.div_rn(127.0, tl.where(highest > LEAST, highest, 1.0)), 0.0)
    tl.store(scales + row, tl.where(sound, tl.div_rn(highest, 127.0), float("nan")))
    for start in range(0, D, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        value = tl.load(x + row * x_row + at, mask=at < D, other=0.0).to(tl.float32)
        whole = (tl.where(sound, value, 0.0) * turn + ROUND) - ROUND
        tl.store(q + row * D + at, whole.to(tl.int8), mask=at < D)


@triton.jit
def widened(bits, FLOAT: tl.constexpr, like):  # type: ignore[no-untyped-def]
    """Numbers of eight bits in the type of `like`. The bits of e4m3 are those of a float16 that is smaller by 2^8."""
    if FLOAT:
        wide = bits.to(tl.uint16)
        return (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True).to(like.dtype)
    return bits.to(like.dtype)


@triton.jit
def quantized_kernel(  # type: ignore[no-untyped-def]
    x, scales, w, w_scales, w_zeros, bias, y, order, expert_of, first_of, end_of, D, F, K, x_row, groups, group,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BITS: tl.constexpr, WHOLE: tl.constexpr, FLOAT: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """y[n] = scale · x[order[n] // K] · wᵀ of one tile; without an order, of x[n].

    WHOLE: rows are whole numbers of these scales. FLOAT: w is e4m3. GROUPED: `group` numbers, not D, share a scale.
    """
    HALF: tl.constexpr = DEPTH // 2
    TOTAL: tl.constexpr = tl.int32 if WHOLE else tl.float32
    blocks = tl.cdiv(F, COLUMNS)
    tile = tl.program_id(0) // blocks
    expert = tl.load(expert_of + tile)
    if expert < 0:
        return
    row = tl.load(first_of + tile) + tl.arange(0, ROWS)
    row_ok = row < tl.load(end_of + tile)
    source = row.to(tl.int64)
    if order is not None:
        source = (tl.load(order + row, mask=row_ok, other=0) // K).to(tl.int64)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    line, line_ok = expert.to(tl.int64) * F + column, column < F
    total, met = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS], tl.float32)
    part = tl.zeros([ROWS, COLUMNS], TOTAL)
    k, j = tl.arange(0, DEPTH), tl.arange(0, HALF)
    for done in range(0, D, DEPTH):
        if BITS == 8:
            k_ok = k < D - done
            x_at = x + source[:, None] * x_row + (done + k)[None, :]
            x_tile = tl.load(x_at, mask=row_ok[:, None] & k_ok[None, :], other=0)
            w_at = w + line[None, :] * D + (done + k)[:, None]
            w_tile = tl.load(w_at, mask=k_ok[:, None] & line_ok[None, :], other=0)
            part = tl.dot(x_tile, widened(w_tile, FLOAT, x_tile), part, input_precision="ieee", out_dtype=TOTAL)
            if w_zeros is not None:
                met += tl.sum(x_tile.to(tl.float32), 1)
        else:
            w_at = w + line[None, :] * (D // 2) + (done // 2 + j)[:, None]
            pairs = tl.load(w_at, mask=line_ok[None, :], other=0)
            x_at = x + source[:, None] * x_row + (done + j)[None, :]
            left = tl.load(x_at, mask=row_ok[:, None], other=0)
            low, high = (pairs & 15).to(tl.int8) - 8, (pairs >> 4).to(tl.int8) - 8
            part = tl.dot(left, low.to(left.dtype), part, input_precision="ieee", out_dtype=TOTAL)
            right = tl.load(x_at + HALF, mask=row_ok[:, None], other=0)
            part = tl.dot(right, high.to(right.dtype), part, input_precision="ieee", out_dtype=TOTAL)
            if w_zeros is not None:
                met += tl.sum(left.to(tl.float32), 1) + tl.sum(right.to(tl.float32), 1)
        if GROUPED:
            place = line * groups + done // group
            found = part.to(tl.float32)
            if w_zeros is not None:
                found -= met[:, None] * tl.load(w_zeros + place, mask=line_ok, other=0.0)[None, :]
                met = tl.zeros([ROWS], tl.float32)
            total += found * tl.load(w_scales + place, mask=line_ok, other=0.0)[None, :]
            part = tl.zeros([ROWS, COLUMNS], TOTAL)
    if not GROUPED:
        total = part.to(tl.float32)
        if w_zeros is not None:
            total -= met[:, None] * tl.load(w_zeros + line, mask=line_ok, other=0.0)[None, :]
        total *= tl.load(w_scales + line, mask=line_ok, other=0.0)[None, :]
    if FLOAT:
        total *= 256.0
    if WHOLE:
        total *= tl.load(scales + source, mask=row_ok, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + column, mask=line_ok, other=0.0).to(tl.float32)[None, :]
    y_at = y + row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row_ok[:, None] & line_ok[None, :])


def quantized_linear_fits(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> bool:
    return runs(x_TD) and not x_TD.requires_grad


def quantized_linear_pays(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> bool:
    return x_TD.is_cuda


def quantized_linear(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> Tensor:
    assert x_TD.shape[-1] == w.depth, "a row of another width would be cut up"
    rows, bias_F = x_TD.reshape(-1, w.depth), None if bias_F is None else bias_F.contiguous()
    ends_1 = torch.full((1,), len(rows), dtype=torch.int32, device=rows.device)
    tile = _tile(rows, len(rows), 1, w)
    y = _product(rows, w, bias_F, None, 1, len(rows), tile, tile_map(ends_1, len(rows), tile.rows), x_TD.dtype)
    return y.view(*x_TD.shape[:-1], y.shape[1])


def quantized_moe_mlp_fits(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> bool:
    learns = x_TD.requires_grad or weights_TK.requires_grad
    return runs(x_TD) and weights_TK.dtype in FLOATS and not learns and w_in.rows == w_out.rows


def quantized_moe_mlp_pays(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> bool:
    return x_TD.is_cuda


def quantized_moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> Tensor:
    E, P = len(w_in.q), ids_TK.numel()
    routing, tile = route(ids_TK, kept_TK, E), _tile(x_TD, P, E, w_in, w_out)
    map_ = tile_map(routing.ends_E, P, tile.rows)
    z_PH = _product(x_TD, w_in, None, routing.order_P, ids_TK.shape[1], P, tile, map_, torch.float32)
    h_PF = swiglu(z_PH).to(x_TD.dtype if w_out.rows == "float" else torch.float32)
    y_PD = _product(h_PF, w_out, None, None, 1, P, tile, map_, torch.float32)
    return gather_sum(y_PD, weights_TK, routing.slot_TK).to(x_TD.dtype)


def _tile(x_ND: Tensor, rows: int, experts: int, *weights: QuantizedWeight) -> Tile:
    """Of all of these weights, which share a tile map."""
    size = x_ND.element_size() if weights[0].rows == "float" else 1
    return quantized_tile(rows, experts, size, any(w.groups > 1 for w in weights))


def _product(
    x_ND: Tensor, w: QuantizedWeight, bias_F: Tensor | None, order_P: Tensor | None, choices: int, rows: int,
    tile: Tile, map_: TileMap, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[rows, F]: of each row, or of the token of each assignment in order, with its expert's weight."""
    x_ND = x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
    (N, D), F = x_ND.shape, w.q.shape[-2]
    y_NF = torch.empty(rows, F, dtype=dtype, device=x_ND.device)
    if y_NF.numel() == 0:
        return y_NF
    scales_N = None
    if w.rows == "int8":
        q_ND = torch.empty(N, D, dtype=torch.int8, device=x_ND.device)
        scales_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
        round_rows_kernel[(N,)](x_ND, q_ND, scales_N, D, x_ND.stride(0), row_columns(D), ROUND, LEAST)
        x_ND = q_ND
    is_float = w.kind == "float"
    quantized_kernel[(map_.most * triton.cdiv(F, tile.columns),)](
        x_ND, scales_N, w.q.view(torch.uint8) if is_float else w.q, w.scale, w.zero if w.zero.numel() else None,
        bias_F, y_NF, order_P, *map_.columns, D, F, choices, x_ND.stride(0), w.groups, D // w.groups,
        tile.rows, tile.columns, BLOCK, w.bits, scales_N is not None, is_float, w.groups > 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_NF
