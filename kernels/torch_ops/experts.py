"""The experts of a layer, one after another, each with products of the library; no copy of all rows is kept.

    forward    x → gather → Z = x · w_inᵀ → swiglu → · w_out → Σ_k over a token's rows
    backward   dH = g · w_outᵀ;  dZ, A, dweights from Z and dH in one pass;
               dw_out = Aᵀ · g,  dw_in = dZᵀ · x,  dx = Σ_k (dZ · w_in)

Kept for backward are x, Z and the routing. The rows and activations of one expert at a time lie in memory that is used
again for the next, and so do its weights where they are cast; a weight's gradient has the weight's own dtype.

The library makes code for every new size of a bfloat16 product, which takes longer than the product. So an expert's
rows are followed by zeros up to one of few sizes, and products write beyond its rows what the next expert overwrites.

T tokens, K choices, D width, E experts, F hidden width, H = 2F, N rows (kept assignments, sorted by expert), n those of
one expert, m with the zeros behind them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..cpp import backward as passes
from ..cpp.call import fits
from ..reference import dense
from ..reference.precision import wide
from ..registry import invariant
from . import composition
from .routing import gather_sum, sort_by_expert


def moe_mlp(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> Tensor:
    if x_TD.device.type != "cpu" or invariant():  # products that the host starts one by one; other orders of sums
        return composition.moe_mlp(x_TD, ids_TK, weights_TK, kept_TK, w_in_EHD, w_out_EFD)
    kept_TK = torch.ones_like(ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    order_N, slot_TK, counts_E = sort_by_expert(ids_TK, kept_TK, len(w_in_EHD))
    return _Experts.apply(x_TD, weights_TK, w_in_EHD, w_out_EFD, order_N, slot_TK, counts_E.tolist())


def expert_rows_fits(x_ND: Tensor, ends_E: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> bool:
    return x_ND.device.type == "cpu"


def expert_rows(x_ND: Tensor, ends_E: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> Tensor:
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return _Experts.apply(x_ND, None, w_in_EHD, w_out_EFD, None, None, counts)


class _Experts(Function):
    """Without an order the rows are sorted by expert already, and each is its own token."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor,
        order_N: Tensor | None, slot_TK: Tensor | None, counts: list[int],
    ) -> Tensor:  # fmt: skip
        x_TD = x_TD.contiguous()
        spans = _Spans(counts, x_TD)
        z_NH = x_TD.new_empty(spans.end, w_in_EHD.shape[1])
        y_ND = spans.rows(x_TD.shape[1])
        h_mF = spans.space(w_out_EFD.shape[1])
        gather, w_in, w_out = _Rows(x_TD, order_N, slot_TK, spans), _Cast(w_in_EHD, x_TD), _Cast(w_out_EFD, x_TD)
        for expert, start, end, room in spans:
            torch.mm(gather(start, end, room), w_in(expert).mT, out=z_NH[start : start + room])
            _swiglu(z_NH[start:end], h_mF[: end - start])
            torch.mm(h_mF[:room], w_out(expert), out=y_ND[start : start + room])
        ctx.save_for_backward(x_TD, z_NH, weights_TK, w_in_EHD, w_out_EFD, order_N, slot_TK)
        ctx.spans, y_ND = spans, y_ND[: spans.total]
        return y_ND if slot_TK is None else gather_sum(y_ND, weights_TK, slot_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, z_NH, weights_TK, w_in_EHD, w_out_EFD, order_N, slot_TK = ctx.saved_tensors
        needs_x, needs_weights, needs_in, needs_out = ctx.needs_input_grad[:4]
        spans = ctx.spans
        x_rows, grad_rows = (_Rows(t.contiguous(), order_N, slot_TK, spans) for t in (x_TD, grad_TD))
        w_in, w_out = _Cast(w_in_EHD, x_TD), _Cast(w_out_EFD, x_TD)
        dw_in, dw_out = _Gradient(w_in_EHD, x_TD, needs_in), _Gradient(w_out_EFD, x_TD, needs_out)
        dx_ND = spans.rows(x_TD.shape[1]) if needs_x else None
        dots_N = z_NH.new_empty(spans.total, dtype=wide(z_NH[:0]).dtype)
        weights_N = None if weights_TK is None else weights_TK.flatten()[order_N].to(dots_N.dtype)
        dz_mH, dh_mF = spans.space(z_NH.shape[1]), spans.space(w_out_EFD.shape[1])
        for expert, start, end, room in spans:
            rows, dz, dh, g_mD = slice(start, end), dz_mH[:room], dh_mF[:room], grad_rows(start, end, room)
            torch.mm(g_mD, w_out(expert).mT, out=dh)
            own = None if weights_N is None else weights_N[rows]
            _swiglu_backward(z_NH[rows], dh[: end - start], own, dz[: end - start], dots_N[rows])
            dz[end - start :].zero_()
            dw_out.product(expert, dh, g_mD)
            if needs_in:
                dw_in.product(expert, dz, x_rows(start, end, room))
            if dx_ND is not None:
                torch.mm(dz, w_in(expert), out=dx_ND[start : start + room])
        dx, dweights = None if dx_ND is None else dx_ND[: spans.total], None
        if slot_TK is not None:
            dx = None if dx is None else gather_sum(dx, None, slot_TK)
            if needs_weights:
                dweights = weights_TK.new_zeros(weights_TK.numel()).index_copy_(0, order_N, dots_N.to(weights_TK.dtype))
                dweights = dweights.view_as(weights_TK)
        return dx, dweights, dw_in.whole, dw_out.whole, None, None, None


class _Spans:
    """(expert, first row, end of its rows, rows of its products), and memory for these."""

    def __init__(self, counts: Sequence[int], like: Tensor) -> None:
        self.like, self.total, self.spans = like.new_empty(0), sum(counts), []
        start = 0
        for expert, count in enumerate(counts):
            self.spans.append((expert, start, start + count, _room(count) if like.element_size() == 2 else count))
            start += count
        self.end = max((start + room for _, start, _, room in self.spans), default=0)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        return iter(self.spans)

    def rows(self, width: int) -> Tensor:
        """For the products of all experts; only the first `total` rows are the experts'."""
        return self.like.new_empty(self.end, width)

    def space(self, width: int) -> Tensor:
        """For those of any one expert."""
        return self.like.new_empty(max((room for *_, room in self.spans), default=0), width)


def _room(count: int) -> int:
    """The next multiple of 8, above 256 of a sixteenth of the power of two below: few sizes, little waste."""
    step = max(8, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


class _Rows:
    """The rows of one expert at a time and zeros behind them, in memory that the next one's take over."""

    def __init__(self, x_TD: Tensor, order_N: Tensor | None, slot_TK: Tensor | None, spans: _Spans) -> None:
        self.x_TD, self.space = x_TD, spans.space(x_TD.shape[1])
        self.token_N = None if order_N is None or slot_TK is None else order_N // slot_TK.shape[1]

    def __call__(self, start: int, end: int, room: int) -> Tensor:
        if self.token_N is not None:
            torch.index_select(self.x_TD, 0, self.token_N[start:end], out=self.space[: end - start])
        elif room == end - start:
            return self.x_TD[start:end]
        else:
            self.space[: end - start] = self.x_TD[start:end]
        self.space[end - start : room].zero_()
        return self.space[:room]


class _Cast:
    """One expert's matrix at a time, in the operands' dtype."""

    def __init__(self, w_EAB: Tensor, x_TD: Tensor) -> None:
        self.w_EAB = w_EAB
        self.space = None if w_EAB.dtype == x_TD.dtype else x_TD.new_empty(w_EAB.shape[1:])

    def __call__(self, expert: int) -> Tensor:
        return self.w_EAB[expert] if self.space is None else self.space.copy_(self.w_EAB[expert])


class _Gradient:
    """The gradient of all matrices, in the type that is asked of it; zero where an expert has no rows."""

    def __init__(self, w_EAB: Tensor, x_TD: Tensor, needed: bool) -> None:
        dtype = w_EAB.grad_dtype or w_EAB.dtype if w_EAB.is_leaf else w_EAB.dtype
        self.whole = w_EAB.new_empty(w_EAB.shape, dtype=dtype) if needed else None
        self.space = None if dtype == x_TD.dtype else x_TD.new_empty(w_EAB.shape[1:])

    def product(self, expert: int, left_nA: Tensor, right_nB: Tensor) -> None:
        """leftᵀ · right, of this expert."""
        if self.whole is None:
            return
        if len(left_nA) == 0:
            self.whole[expert].zero_()
        elif self.space is None:
            torch.mm(left_nA.mT, right_nB, out=self.whole[expert])
        else:
            self.whole[expert].copy_(torch.mm(left_nA.mT, right_nB, out=self.space))


def _swiglu(z_nH: Tensor, out_nF: Tensor) -> None:
    if fits(z_nH):
        passes.swiglu(z_nH, out_nF)
    else:
        out_nF.copy_(dense.swiglu(z_nH))


def _swiglu_backward(z_nH: Tensor, grad_nF: Tensor, weights_n: Tensor | None, out_nH: Tensor, dots_n: Tensor) -> None:
    """As `cpp.backward.swiglu_backward`."""
    if fits(z_nH):
        passes.swiglu_backward(z_nH, grad_nF, weights_n, out_nH, dots_n)
        return
    gate, up = wide(z_nH).chunk(2, -1)
    grad, sigmoid = wide(grad_nF), gate.sigmoid()
    hidden = gate * sigmoid * up
    dots_n.copy_((grad * hidden).sum(-1))
    scale = 1.0 if weights_n is None else weights_n[:, None]
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    out_nH.copy_(torch.cat((grad * scale * up * slope, grad * scale * gate * sigmoid), -1))
    grad_nF.copy_(hidden * scale)
