"""The gradients of a layer of experts, from its input, the gate's and up projection's results and the routing alone.

With s the routing weight, g the gradient of the output, a = swiglu(z) and h' = w_out[e] · g[t]:
grad s = a · h', grad z = swiglu'(z) · s h', grad w_out[e] = Σ s a gᵀ, grad w_in[e] = Σ grad z xᵀ, grad x = Σ_k w_inᵀ
grad z (Guo et al. 2025, SonicMoE). Rows are summed in their order by one program a tile: no atomics.

T tokens, K choices, P = T·K assignments, E experts, D width, F hidden width, H = 2F.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import ExpertTiles, Tile, weight_tile
from .combine import gather_sum
from .grouped_gemm import TileMap, product
from .route import Routing

LINE = 256  # assignments whose row dots a program adds up


@triton.jit
def hidden_grad_kernel(  # type: ignore[no-untyped-def]
    grad, w, z, weights, grad_z, scaled, dots, order, expert_of, first_of, end_of, D, F, K,
    grad_row, grad_k, w_expert, w_row, w_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Of one tile: grad z, s · a, and this block of columns' part of a · h'. EVEN: DEPTH divides D."""
    blocks = tl.cdiv(F, COLUMNS)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    expert = tl.load(expert_of + tile)
    if expert < 0:
        return
    row = tl.load(first_of + tile) + tl.arange(0, ROWS)
    row_ok = row < tl.load(end_of + tile)
    flat = tl.load(order + row, mask=row_ok, other=0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < F
    k = tl.arange(0, DEPTH)
    grad_at = grad + (flat // K).to(tl.int64)[:, None] * grad_row + k[None, :] * grad_k
    w_at = w + expert.to(tl.int64) * w_expert + k[:, None] * w_k + column[None, :].to(tl.int64) * w_row
    h = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, D, DEPTH):
        if EVEN:
            grad_tile = tl.load(grad_at, mask=row_ok[:, None], other=0.0)
            w_tile = tl.load(w_at, mask=column_ok[None, :], other=0.0)
        else:
            k_ok = k < D - done
            grad_tile = tl.load(grad_at, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            w_tile = tl.load(w_at, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        h = tl.dot(grad_tile, w_tile, h, input_precision="ieee")
        grad_at += DEPTH * grad_k
        w_at += DEPTH * w_k
    ok = row_ok[:, None] & column_ok[None, :]
    z_at = row.to(tl.int64)[:, None] * (2 * F) + column[None, :]
    gate = tl.load(z + z_at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(z + z_at + F, mask=ok, other=0.0).to(tl.float32)
    weight = tl.load(weights + flat, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(dots + row.to(tl.int64) * blocks + block, tl.sum(h * silu * up, 1), mask=row_ok)
    tl.store(
        scaled + row.to(tl.int64)[:, None] * F + column[None, :], (weight * silu * up).to(z.dtype.element_ty), mask=ok
    )
    h *= weight
    tl.store(grad_z + z_at, (h * up * (share + silu * (1 - share))).to(z.dtype.element_ty), mask=ok)
    tl.store(grad_z + z_at + F, (h * silu).to(z.dtype.element_ty), mask=ok)


@triton.jit
def weight_grad_kernel(  # type: ignore[no-untyped-def]
    left, right, out, order, ends, M, N, K, right_row, right_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[e] = Σ over e's rows n, in order, of left[n]ᵀ right[order[n] // K]; zero for an expert without rows."""
    blocks = tl.cdiv(N, COLUMNS)
    expert = tl.program_id(1)
    m = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, DEPTH):
        row = start + tl.arange(0, DEPTH)
        row_ok = row < end
        token = (tl.load(order + row, mask=row_ok, other=0) // K).to(tl.int64)
        left_at = left + row.to(tl.int64)[None, :] * M + m[:, None]
        right_at = right + token[:, None] * right_row + n[None, :] * right_column
        left_tile = tl.load(left_at, mask=(m < M)[:, None] & row_ok[None, :], other=0.0)
        right_tile = tl.load(right_at, mask=row_ok[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision="ieee")
    out_at = out + (expert.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def dots_kernel(dots, slots, grad_weights, assignments, blocks, LINE: tl.constexpr):  # type: ignore[no-untyped-def]
    """grad_weights[t, k] = the parts of its row's dot added in the order of the columns; 0 where not kept."""
    flat = tl.program_id(0) * LINE + tl.arange(0, LINE)
    slot = tl.load(slots + flat, mask=flat < assignments, other=-1).to(tl.int64)
    total = tl.zeros([LINE], tl.float32)
    for block in range(0, blocks):
        total += tl.load(dots + slot * blocks + block, mask=slot >= 0, other=0.0)
    tl.store(grad_weights + flat, total.to(grad_weights.dtype.element_ty), mask=flat < assignments)


def backward(
    grad_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor, z_PH: Tensor,
    routing: Routing, map_: TileMap, tiles: ExpertTiles, needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, weights, w_in and w_out, each where needed."""
    grad_z, scaled_PF, grad_weights = _hidden(grad_TD, weights_TK, w_out_EFD, z_PH, routing, map_, tiles.back)
    grad_out = _weight_grad(scaled_PF, grad_TD, routing, w_out_EFD) if needed[3] else None
    del scaled_PF
    grad_in = _weight_grad(grad_z, x_TD, routing, w_in_EHD) if needed[2] else None
    grad_x = gather_sum(product(grad_z, w_in_EHD, map_, tiles.down), None, routing.slot_TK) if needed[0] else None
    return grad_x, grad_weights if needed[1] else None, grad_in, grad_out


def _hidden(
    grad_TD: Tensor, weights_TK: Tensor, w_out_EFD: Tensor, z_PH: Tensor,
    routing: Routing, map_: TileMap, tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad z [P, H], s · a [P, F], grad s [T, K])."""
    K, (F, D), P = weights_TK.shape[1], w_out_EFD.shape[1:], len(z_PH)
    blocks = triton.cdiv(F, tile.columns)
    grad_z, scaled_PF = torch.empty_like(z_PH), z_PH.new_empty(P, F)
    dots = torch.empty(P, blocks, dtype=torch.float32, device=z_PH.device)
    grad_weights, weights = weights_TK.new_empty(weights_TK.shape), weights_TK.contiguous()
    if P:
        hidden_grad_kernel[(map_.most * blocks,)](
            grad_TD, w_out_EFD, z_PH, weights, grad_z, scaled_PF, dots, routing.order_P, *map_.columns, D, F, K,
            *grad_TD.stride(), *w_out_EFD.stride(),
            tile.rows, tile.columns, tile.depth, D % tile.depth == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        dots_kernel[(triton.cdiv(P, LINE),)](dots, routing.slot_TK, grad_weights, P, blocks, LINE)
    return grad_z, scaled_PF, grad_weights


def _weight_grad(left_PM: Tensor, right_TN: Tensor, routing: Routing, like_EMN: Tensor) -> Tensor:
    """[E, M, N] in the weights' dtype: each expert's rows of `left` against the tokens' rows of `right`."""
    E, M, N = like_EMN.shape
    out_EMN = like_EMN.new_zeros(E, M, N) if len(left_PM) == 0 else like_EMN.new_empty(E, M, N)
    tile, K = weight_tile(left_PM.element_size()), routing.slot_TK.shape[1]
    if len(left_PM):
        weight_grad_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns), E)](
            left_PM, right_TN, out_EMN, routing.order_P, routing.ends_E, M, N, K, *right_TN.stride(),
            tile.rows, tile.columns, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out_EMN
