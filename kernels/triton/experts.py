"""A layer of experts behind its router: no permuted copy, no host synchronisation, no atomics, every sum in one order.

Rows are fetched by the product that needs them. For the backward pass only the input, the gate's and the up
projection's results and the routing are kept.

T tokens, K choices, P = T·K assignments, E experts, D width, F hidden width, H = 2F.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..configs import ExpertTiles, expert_tiles, few
from .combine import gather_sum
from .decode_experts import decode
from .experts_backward import backward
from .grouped_gemm import TileMap, product, tile_map
from .probe import FLOATS, runs
from .route import Routing, route


@triton.jit
def up_kernel(  # type: ignore[no-untyped-def]
    x, w, h, z, order, expert_of, first_of, end_of, D, F, K, x_row, x_k, w_expert, w_row, w_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """h[n] = swiglu(x[order[n] // K] · wᵀ) of one tile; z, if wanted, is what swiglu reads. EVEN: DEPTH divides D."""
    blocks = tl.cdiv(F, COLUMNS)
    tile = tl.program_id(0) // blocks
    expert = tl.load(expert_of + tile)
    if expert < 0:
        return
    row = tl.load(first_of + tile) + tl.arange(0, ROWS)
    row_ok = row < tl.load(end_of + tile)
    token = (tl.load(order + row, mask=row_ok, other=0) // K).to(tl.int64)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < F
    k = tl.arange(0, DEPTH)
    x_at = x + token[:, None] * x_row + k[None, :] * x_k
    gate_at = w + expert.to(tl.int64) * w_expert + k[:, None] * w_k + column[None, :].to(tl.int64) * w_row
    up_at = gate_at + F * w_row
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, D, DEPTH):
        if EVEN:
            x_tile = tl.load(x_at, mask=row_ok[:, None], other=0.0)
            gate_tile = tl.load(gate_at, mask=column_ok[None, :], other=0.0)
            up_tile = tl.load(up_at, mask=column_ok[None, :], other=0.0)
        else:
            k_ok = k < D - done
            x_tile = tl.load(x_at, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            gate_tile = tl.load(gate_at, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
            up_tile = tl.load(up_at, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        gate = tl.dot(x_tile, gate_tile, gate, input_precision="ieee")
        up = tl.dot(x_tile, up_tile, up, input_precision="ieee")
        x_at += DEPTH * x_k
        gate_at += DEPTH * w_k
        up_at += DEPTH * w_k
    ok = row_ok[:, None] & column_ok[None, :]
    if z is not None:
        z_at = z + row.to(tl.int64)[:, None] * (2 * F) + column[None, :]
        tl.store(z_at, gate.to(z.dtype.element_ty), mask=ok)
        tl.store(z_at + F, up.to(z.dtype.element_ty), mask=ok)
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(h + at, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=ok)


def moe_mlp_fits(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> bool:
    one_dtype = x_TD.dtype == w_in_EHD.dtype == w_out_EFD.dtype
    return runs(x_TD) and one_dtype and weights_TK.dtype in FLOATS


def moe_mlp_pays(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> bool:
    return x_TD.is_cuda and x_TD.element_size() == 2


def moe_mlp(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> Tensor:
    operands = (x_TD, weights_TK, w_in_EHD, w_out_EFD)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    T, K = ids_TK.shape
    if not wanted and few(T, K, len(w_in_EHD)):
        return decode(x_TD, ids_TK, weights_TK, kept_TK, w_in_EHD, w_out_EFD)
    return MoeMlp.apply(x_TD, ids_TK, weights_TK, kept_TK, w_in_EHD, w_out_EFD, wanted, None)


def expert_rows_fits(x_ND: Tensor, ends_E: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> bool:
    return runs(x_ND) and x_ND.dtype == w_in_EHD.dtype == w_out_EFD.dtype


def expert_rows_pays(x_ND: Tensor, ends_E: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> bool:
    return x_ND.is_cuda and x_ND.element_size() == 2


def expert_rows(x_ND: Tensor, ends_E: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> Tensor:
    """A layer in which each row has one choice, of weight one; sorting leaves the rows where they are."""
    at_N = torch.arange(len(x_ND), device=x_ND.device, dtype=ends_E.dtype)
    ids_N1 = torch.searchsorted(ends_E.contiguous(), at_N, right=True)[:, None]
    ones_N1 = torch.ones(len(x_ND), 1, device=x_ND.device)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, w_in_EHD, w_out_EFD))
    return MoeMlp.apply(x_ND, ids_N1, ones_N1, None, w_in_EHD, w_out_EFD, wanted, None)


def up(
    x_TD: Tensor, w_in_EHD: Tensor, routing: Routing, map_: TileMap, tiles: ExpertTiles, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(swiglu of the gate and the up projection [P, F], what it read [P, H] if it is to be kept)."""
    (T, D), P, H = x_TD.shape, len(routing.order_P), w_in_EHD.shape[1]
    h_PF, z_PH = x_TD.new_empty(P, H // 2), x_TD.new_empty(P, H) if keep else None
    tile = tiles.up
    if h_PF.numel():
        up_kernel[(map_.most * triton.cdiv(H // 2, tile.columns),)](
            x_TD, w_in_EHD, h_PF, z_PH, routing.order_P, *map_.columns, D, H // 2, P // T,
            *x_TD.stride(), *w_in_EHD.stride(),
            tile.rows, tile.columns, tile.depth, D % tile.depth == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return h_PF, z_PH


class MoeMlp(Function):
    """The layer with its gradients; the tiles are those of the table unless some are given."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None,
        w_in_EHD: Tensor, w_out_EFD: Tensor, wanted: bool, tiles: ExpertTiles | None,
    ) -> Tensor:  # fmt: skip
        P, E = ids_TK.numel(), len(w_in_EHD)
        tiles = tiles or expert_tiles(P, E, x_TD.element_size())
        routing = route(ids_TK, kept_TK, E)
        map_ = tile_map(routing.ends_E, P, tiles.down.rows)
        h_PF, z_PH = up(x_TD, w_in_EHD, routing, map_, tiles, wanted)
        y_PD = product(h_PF, w_out_EFD, map_, tiles.down)
        if wanted:
            ctx.save_for_backward(x_TD, weights_TK, w_in_EHD, w_out_EFD, z_PH)
            ctx.routing, ctx.map, ctx.tiles = routing, map_, tiles
        return gather_sum(y_PD, weights_TK, routing.slot_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, w_in_EHD, w_out_EFD, z_PH = ctx.saved_tensors
        grad_x, grad_weights, grad_in, grad_out = backward(
            grad_TD, x_TD, weights_TK, w_in_EHD, w_out_EFD, z_PH, ctx.routing, ctx.map, ctx.tiles,
            [ctx.needs_input_grad[i] for i in (0, 2, 4, 5)],
        )  # fmt: skip
        return grad_x, None, grad_weights, None, grad_in, grad_out, None, None
