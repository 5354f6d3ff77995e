"""What the matrices of a block meet when rows go through it. N rows, F output width, D input width."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.attention import Attention
from ..layers.block import Block
from ..layers.experts import Experts
from ..layers.quantized import matrices, stacks
from .seen import Seen

Met = dict[str, list[Seen]]
"""By name of a matrix in its block: one `Seen`, of a stack one an expert (`ffn.experts.w_in`, `ffn.experts.w_out`)."""


@contextmanager
def watching(block: Block, gram: bool) -> Iterator[Met]:
    """Note what goes into every matrix of `block` that can be rounded, until the context ends.

    Matrices that are given the same rows share one `Seen`.

    Args:
        block: of whole weights.
        gram: sum up x · xᵀ too.
    """
    met: Met = {}
    watch, undo = _Rows(met, gram), list[tuple[nn.Module, str, Any]]()
    for module in block.modules():
        if isinstance(module, Attention):  # so that queries, keys and values are asked of their modules
            undo.append((module, "plain", module.plain))
            module.plain = False
    hooks = [linear.register_forward_pre_hook(watch.of(name, linear.in_features)) for name, linear in matrices(block)]
    for name, experts in list(stacks(block)):
        undo.append((block.get_submodule(name.rpartition(".")[0]), "experts", experts))
        block.set_submodule(name, _Watched(experts, name, met, gram))
    try:
        yield met
    finally:
        for hook in hooks:
            hook.remove()
        for module, attribute, value in undo:
            setattr(module, attribute, value)


def places(block: nn.Module) -> Iterator[tuple[str, Tensor, str, int]]:
    """Every matrix of a block: its name, itself [F, D], and the name and number under which `watching` notes its rows.

    Of a stack each expert's is one, `ffn.experts.w_in[3]`; the tensors are views of the block's.
    """
    for name, linear in matrices(block):
        yield name, linear.weight, name, 0
    for name, experts in stacks(block):
        for expert, (in_FD, out_FD) in enumerate(zip(experts.w_in, experts.w_out, strict=True)):
            yield f"{name}.w_in[{expert}]", in_FD, f"{name}.w_in", expert
            yield f"{name}.w_out[{expert}]", out_FD.mT, f"{name}.w_out", expert


class _Rows:
    """Notes the rows of projections."""

    def __init__(self, met: Met, gram: bool) -> None:
        self._met, self._gram = met, gram
        self._last: tuple[Tensor, str] | None = None

    def of(self, name: str, depth: int) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x_TD,) = inputs
            if self._last is not None and self._last[0] is x_TD:
                self._met[name] = self._met[self._last[1]]
                return
            self._met.setdefault(name, [Seen.nothing(depth, self._gram)])[0].add(x_TD)
            self._last = (x_TD, name)

        return note


class _Watched(nn.Module):
    """Experts that are computed one by one, so that each one's rows and hidden rows can be noted."""

    plain = False

    def __init__(self, experts: Experts, name: str, met: Met, gram: bool) -> None:
        super().__init__()
        self.experts, self.cfg = experts, experts.cfg
        count, hidden, width = experts.w_out.shape
        self._in = met.setdefault(f"{name}.w_in", [Seen.nothing(width, gram) for _ in range(count)])
        self._out = met.setdefault(f"{name}.w_out", [Seen.nothing(hidden, gram) for _ in range(count)])

    def forward(self, x_ND: Tensor, ends_E: Tensor, dropped_NF: Tensor | None = None) -> Tensor:
        own, y_ND, first = self.experts, torch.empty_like(x_ND), 0
        for e, last in enumerate(ends_E.tolist()):
            rows_ND = x_ND[first:last]
            self._in[e].add(rows_ND)
            h_NF = rows_ND @ own.w_in[e].mT
            h_NF = own.act(h_NF if own.b_in is None else h_NF + own.b_in[e])
            self._out[e].add(h_NF)
            y = h_NF @ own.w_out[e]
            y_ND[first:last] = y if own.b_out is None else y + own.b_out[e]
            first = last
        return y_ND
