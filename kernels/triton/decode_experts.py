"""A layer of experts for few tokens in two launches, without sorting: every assignment reads its expert's weights.

A program computes a slice of an assignment's hidden row and at once what this slice adds to the output; the parts are
added in the order of the slices, then of the choices.

T tokens, K choices, P = T·K assignments, S slices, D width, F hidden width, H = 2F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import FEW_TILE, row_columns


@triton.jit
def slice_kernel(  # type: ignore[no-untyped-def]
    x, ids, kept, w_in, w_out, parts, D, F, K, x_row, x_k, in_expert, in_row, in_k, out_expert, out_row, out_column,
    SLICE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts[p, s] = swiglu(x · w_in[e, slice]ᵀ) · w_out[e, slice] in float32."""
    p, s = tl.program_id(0), tl.program_id(1)
    expert = tl.load(ids + p).to(tl.int64)
    row = s * SLICE + tl.arange(0, SLICE)
    row_ok = row < F
    if kept is not None:
        row_ok = row_ok & (tl.load(kept + p) != 0)
    k = tl.arange(0, COLUMNS)
    gates = tl.zeros([SLICE, COLUMNS], tl.float32)
    ups = tl.zeros([SLICE, COLUMNS], tl.float32)
    for done in range(0, D, COLUMNS):
        ok = row_ok[:, None] & (k < D - done)[None, :]
        at = w_in + expert * in_expert + row.to(tl.int64)[:, None] * in_row + (done + k)[None, :] * in_k
        values = tl.load(x + (p // K).to(tl.int64) * x_row + (done + k) * x_k, mask=k < D - done, other=0.0)
        values = values.to(tl.float32)[None, :]
        gates += tl.load(at, mask=ok, other=0.0).to(tl.float32) * values
        ups += tl.load(at + F * in_row, mask=ok, other=0.0).to(tl.float32) * values
    gate = tl.sum(gates, 1)
    h = (gate * tl.sigmoid(gate) * tl.sum(ups, 1)).to(x.dtype.element_ty).to(tl.float32)
    part = parts + (p.to(tl.int64) * tl.num_programs(1) + s) * D
    for done in range(0, D, COLUMNS):
        column = done + k
        at = w_out + expert * out_expert + row.to(tl.int64)[:, None] * out_row + column[None, :] * out_column
        tile = tl.load(at, mask=row_ok[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
        tl.store(part + column, tl.sum(tile * h[:, None], 0), mask=column < D)


@triton.jit
def slice_sum_kernel(parts, weights, kept, out, D, K, S, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[t] = Σ_k weights[t, k] · Σ_s parts[t, k, s], ascending; what is not kept is neither read nor counted."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in range(0, K):
        flat = token * K + k
        ok = column < D
        weight = tl.load(weights + flat).to(tl.float32)
        if kept is not None:
            there = tl.load(kept + flat) != 0
            ok = ok & there
            weight = tl.where(there, weight, 0.0)
        y = tl.zeros([COLUMNS], tl.float32)
        for s in range(0, S):
            y += tl.load(parts + (flat * S + s) * D + column, mask=ok, other=0.0)
        total += weight * y
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


def decode(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> Tensor:
    """As `moe_mlp`; not differentiable."""
    (T, K), (F, D) = ids_TK.shape, w_out_EFD.shape[1:]
    out_TD = x_TD.new_empty(T, D)
    if out_TD.numel() == 0:
        return out_TD
    ids, weights = ids_TK.contiguous(), weights_TK.contiguous()
    kept = None if kept_TK is None else kept_TK.contiguous().view(torch.uint8)
    slices, columns = triton.cdiv(F, FEW_TILE.rows), row_columns(D)
    parts = torch.empty(T * K, slices, D, dtype=torch.float32, device=x_TD.device)
    slice_kernel[(T * K, slices)](
        x_TD, ids, kept, w_in_EHD, w_out_EFD, parts, D, F, K,
        *x_TD.stride(), *w_in_EHD.stride(), *w_out_EFD.stride(), FEW_TILE.rows, FEW_TILE.columns,
        num_warps=FEW_TILE.warps, num_stages=FEW_TILE.stages,
    )  # fmt: skip
    slice_sum_kernel[(T, triton.cdiv(D, columns))](parts, weights, kept, out_TD, D, K, slices, columns)
    return out_TD
