"""What a MoE layer saw in calibration: its rows, and where its router sent them.

T tokens, D width, E experts, K choices.

with noting(block.ffn) as parts:
    stream.show(block)
routed = Routed.joined(parts)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ... import NonFiniteError
from ...configs.typed import check
from ..layers.moe import MoE
from ..routing.record import RouteContext, Routing


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Valid tokens and their routing, of one layer.

    Attributes:
        rows_TD: what entered the layer.
        ids_TK: int64, the experts chosen.
        gates_TK: what their outputs were multiplied by; 0 where the choice was dropped.
        logits_TE: the router's.
    """

    rows_TD: Tensor
    ids_TK: Tensor
    gates_TK: Tensor
    logits_TE: Tensor

    @classmethod
    def of(cls, x_TD: Tensor, routing: Routing, context: RouteContext | None = None) -> "Routed":
        """One forward pass, without its padding."""
        kept_TK, valid_T = routing.kept_TK, None if context is None else context.valid_T
        found = (x_TD, routing.ids_TK, routing.weights_TK * kept_TK, routing.logits_TE)
        rows_TD, ids_TK, gates_TK, logits_TE = found if valid_T is None else (tensor[valid_T] for tensor in found)
        return cls(rows_TD=rows_TD, ids_TK=ids_TK, gates_TK=gates_TK, logits_TE=logits_TE)

    @classmethod
    def joined(cls, parts: Sequence["Routed"]) -> "Routed":
        """Several passes as one.

        Raises:
            ConfigError: no token at all. NonFiniteError: rows or gates that are not numbers.
        """
        tokens = sum(len(part.rows_TD) for part in parts)
        check(tokens > 0, "calibration", f"{tokens} tokens", "must show the experts some text", "give more of it")
        whole = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        for name in ("rows_TD", "gates_TK"):
            if not whole[name].isfinite().all():
                raise NonFiniteError(f"{name} of experts in calibration must be numbers: look for a diverged weight")
        return cls(**whole)

    @property
    def load_E(self) -> Tensor:  # noqa: N802
        """float64 [E]: tokens that each expert computed."""
        return self._summed((self.gates_TK != 0).double())

    @property
    def gate_E(self) -> Tensor:  # noqa: N802
        """float64 [E]: the sum of their gates."""
        return self._summed(self.gates_TK.double())

    def energy_E(self, moe: MoE) -> Tensor:  # noqa: N802
        """float64 [E]: Σ ‖gate · E(x)‖², how far the layer's output moves where an expert's part is left out."""
        sums_E = torch.zeros(moe.cfg.num_experts, dtype=torch.float64)
        for expert in range(len(sums_E)):
            token_N, choice_N = ((self.ids_TK == expert) & (self.gates_TK != 0)).nonzero(as_tuple=True)
            y_ND = expert_output(moe, expert, self.rows_TD[token_N]) * self.gates_TK[token_N, choice_N, None]
            sums_E[expert] = y_ND.double().square().sum()
        return sums_E

    def _summed(self, numbers_TK: Tensor) -> Tensor:
        zeros_E = torch.zeros(self.logits_TE.shape[1], dtype=torch.float64)
        return zeros_E.index_add_(0, self.ids_TK.flatten(), numbers_TK.flatten())


@torch.no_grad()
def expert_output(moe: MoE, expert: int, x_ND: Tensor) -> Tensor:
    """E_e(x) of every row, [N, D]."""
    ends_E = torch.full((moe.cfg.num_experts,), len(x_ND), dtype=torch.int32)
    ends_E[:expert] = 0
    y_ND: Tensor = moe.experts(x_ND, ends_E)
    return y_ND


@contextmanager
def noting(moe: MoE) -> Iterator[list[Routed]]:
    """Note every forward pass of `moe` until the context ends."""
    parts: list[Routed] = []

    def note(_: nn.Module, given: tuple[Any, ...], made: tuple[Tensor, Routing]) -> None:
        x_TD, context = (*given, None)[:2]
        parts.append(Routed.of(x_TD.detach(), made[1].detach(), context))

    hook = moe.register_forward_hook(note)
    try:
        yield parts
    finally:
        hook.remove()
