"""Products with weights of eight or four bits: whole numbers times whole numbers, added up exactly by tensor cores.

Rows are rounded to eight bits by a kernel of their own; four-bit weights are taken apart in registers, and the sums of
the numbers that share a scale are added up in float32.

T tokens, K choices, P = T·K assignments, N rows, D input width, F output width, H = 2F of a gate and an up
projection, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import Tile, grouped_gemm_tile, row_columns
from ..quantized import BLOCK, QuantizedWeight
from .combine import gather_sum
from .grouped_gemm import TileMap, tile_map
from .norm import swiglu
from .probe import FLOATS, runs
from .route import route
from .store import ROUND


@triton.jit
def round_rows_kernel(x, q, scales, D, x_row, COLUMNS: tl.constexpr, ROUND: tl.constexpr):  # type: ignore[no-untyped-def]
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
    turn = tl.where(highest > 0, tl.div_rn(127.0, tl.where(highest > 0, highest, 1.0)), 0.0)
    tl.store(scales + row, tl.where(sound, tl.div_rn(highest, 127.0), float("nan")))
    for start in range(0, D, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        value = tl.load(x + row * x_row + at, mask=at < D, other=0.0).to(tl.float32)
        whole = (tl.where(sound, value, 0.0) * turn + ROUND) - ROUND
        tl.store(q + row * D + at, whole.to(tl.int8), mask=at < D)


@triton.jit
def quantized_kernel(  # type: ignore[no-untyped-def]
    x, scales, w, w_scales, bias, y, order, expert_of, first_of, end_of, D, F, K, groups, group,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """y[n] = scale · x[order[n] // K] · wᵀ of one tile; without an order, of x[n]. `group` numbers share a scale."""
    HALF: tl.constexpr = DEPTH // 2
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
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if BITS == 8:
        k = tl.arange(0, DEPTH)
        whole = tl.zeros([ROWS, COLUMNS], tl.int32)
        for done in range(0, D, DEPTH):
            k_ok = k < D - done
            x_at, w_at = x + source[:, None] * D + (done + k)[None, :], w + line[None, :] * D + (done + k)[:, None]
            x_tile = tl.load(x_at, mask=row_ok[:, None] & k_ok[None, :], other=0)
            w_tile = tl.load(w_at, mask=k_ok[:, None] & line_ok[None, :], other=0)
            whole = tl.dot(x_tile, w_tile, whole, out_dtype=tl.int32)
        total = whole.to(tl.float32) * tl.load(w_scales + line, mask=line_ok, other=0.0)[None, :]
    else:
        j = tl.arange(0, HALF)
        for done in range(0, D, DEPTH):
            x_at = x + source[:, None] * D + (done + j)[None, :]
            w_at = w + line[None, :] * (D // 2) + (done // 2 + j)[:, None]
            pairs = tl.load(w_at, mask=line_ok[None, :], other=0)
            low, high = (pairs & 15).to(tl.int8) - 8, (pairs >> 4).to(tl.int8) - 8
            whole = tl.dot(tl.load(x_at, mask=row_ok[:, None], other=0), low, out_dtype=tl.int32)
            whole = tl.dot(tl.load(x_at + HALF, mask=row_ok[:, None], other=0), high, whole, out_dtype=tl.int32)
            scale = tl.load(w_scales + line * groups + done // group, mask=line_ok, other=0.0)
            total += whole.to(tl.float32) * scale[None, :]
    total *= tl.load(scales + source, mask=row_ok, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + column, mask=line_ok, other=0.0).to(tl.float32)[None, :]
    y_at = y + row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row_ok[:, None] & line_ok[None, :])


def known(w: QuantizedWeight) -> bool:
    plain = w.kind == "int" and not w.zero.numel() and (w.bits == 4 or w.scale.ndim < w.q.ndim)
    return plain and w.rows == "int8"


def quantized_linear_fits(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> bool:
    return runs(x_TD) and not x_TD.requires_grad and known(w)


def quantized_linear_pays(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> bool:
    return x_TD.is_cuda


def quantized_linear(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> Tensor:
    rows = x_TD.reshape(-1, w.depth)
    ends_1 = torch.full((1,), len(rows), dtype=torch.int32, device=rows.device)
    map_ = tile_map(ends_1, len(rows), _tile(len(rows), 1).rows)
    y = _product(rows, w, bias_F, None, 1, len(rows), 1, map_, x_TD.dtype)
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
    return runs(x_TD) and weights_TK.dtype in FLOATS and not learns and known(w_in) and known(w_out)


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
    routing = route(ids_TK, kept_TK, E)
    map_ = tile_map(routing.ends_E, P, _tile(P, E).rows)
    z_PH = _product(x_TD, w_in, None, routing.order_P, ids_TK.shape[1], P, E, map_, torch.float32)
    y_PD = _product(swiglu(z_PH), w_out, None, None, 1, P, E, map_, torch.float32)
    return gather_sum(y_PD, weights_TK, routing.slot_TK).to(x_TD.dtype)


def _tile(rows: int, experts: int) -> Tile:
    return grouped_gemm_tile(rows, experts, 2)


def _product(
    x_ND: Tensor, w: QuantizedWeight, bias_F: Tensor | None, order_P: Tensor | None, choices: int, rows: int,
    experts: int, map_: TileMap, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[rows, F]: of each row, or of the token of each assignment in order, with its expert's weight."""
    x_ND = x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
    (N, D), F, tile = x_ND.shape, w.q.shape[-2], _tile(rows, experts)
    y_NF = torch.empty(rows, F, dtype=dtype, device=x_ND.device)
    if y_NF.numel() == 0:
        return y_NF
    q_ND = torch.empty(N, D, dtype=torch.int8, device=x_ND.device)
    scales_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    round_rows_kernel[(N,)](x_ND, q_ND, scales_N, D, x_ND.stride(0), row_columns(D), ROUND)
    groups = w.scale.shape[-1] if w.bits == 4 else 1
    quantized_kernel[(map_.most * triton.cdiv(F, tile.columns),)](
        q_ND, scales_N, w.q.contiguous(), w.scale.contiguous(), bias_F, y_NF, order_P, *map_.columns, D, F, choices,
        groups, D // groups, tile.rows, tile.columns, BLOCK, w.bits, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_NF
