"""The routing decision and its surroundings, as immutable data.

A router returns one `Routing`; dispatch, losses, metrics, recomputation, tracing, replay and serving read it, and
nothing routes twice.

T tokens, E experts, K choices, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...kernels.reference.gates import sigmoid_shares
from ...parallel.spread import Spread


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is decided, once a layer and forward pass, and never computed again: nothing here carries a gradient.

    Attributes:
        ids_TK: int64, chosen experts, best first.
        wanted_TK: bool, assignments that ask for a slot: not padding's, not a second choice that was not drawn.
        kept_TK: bool, wanted assignments that found one.
        asked_TK: int64, the experts first asked, where a reroute changed some; None = ids_TK.
        sums: name → a statistic over more than this rank's tokens that a loss used; recomputation must not sum again.
    """

    ids_TK: Tensor
    wanted_TK: Tensor
    kept_TK: Tensor
    asked_TK: Tensor | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, rows: Tensor) -> "Decision":
        """The decision for some of the tokens (int64 indices), without sums."""
        asked_TK = None if self.asked_TK is None else self.asked_TK[rows]
        return Decision(
            ids_TK=self.ids_TK[rows], wanted_TK=self.wanted_TK[rows], kept_TK=self.kept_TK[rows], asked_TK=asked_TK
        )

    @property
    def choice(self) -> Tensor:
        """The experts that the router chose, before any drop: what load and balance are about."""
        return self.ids_TK if self.asked_TK is None else self.asked_TK


@dataclass(frozen=True, kw_only=True)
class RouteContext:
    """What a router must know besides the hidden states. The default is one group of valid tokens.

    Attributes:
        cu_groups: int [G+1], token offsets of the groups whose capacity is shared and whose balance is measured (in
            training a packed row, in evaluation and serving a sequence); None = all tokens are one group.
        valid_T: bool, False for padding, which routes nowhere; None = all valid.
        token_ids_T: int, the input ids (hash routing, tracing).
        index_T: int64, global token index that keys random numbers, so that every layout draws the same; None = 0..T-1.
        step: optimizer step, also a key of the random numbers.
        seed: the run's seed.
        total_tokens: valid tokens of the GLOBAL batch, the divisor of every loss; None = those at hand.
        dropless: ignore every capacity (serving's default).
        taken: layer → int [G, E], slots that each group's earlier tokens, which are not at hand, have taken: what was
            kept of them. Only where the capacity does not follow from the tokens at hand. None = there are no earlier.
        reducer: sums a tensor over the ranks that hold tokens of this layer (statistics over the global batch); None =
            one rank.
        tally: (layer, name) → sums of this rank's earlier micro-batches of the same optimizer step, which routers read
            and add to; the trainer gives one empty dict a step. None = every forward pass is a step.
        loss_scale: what the caller multiplies its loss by (gradient scaling in float16), for balance losses too.
        spread: how a row's tokens are divided over ranks; the tokens at hand are then a part of their groups. None = a
            group's tokens are all here.
        whole: with `spread`, the same of all the row's tokens, as one rank would have it.
        replay: layer → the decision to take instead of choosing one.
        propagate_nan: a NaN logit makes its token's weights NaN instead of raising, for callers that look at the
            loss on all ranks anyway (raising on one rank would leave the others waiting).
    """

    cu_groups: Tensor | None = None
    valid_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    index_T: Tensor | None = None
    step: int = 0
    seed: int = 0
    total_tokens: int | None = None
    dropless: bool = False
    taken: Mapping[int, Tensor] | None = None
    reducer: Callable[[Tensor], Tensor] | None = None
    tally: dict[tuple[int, str], Tensor] | None = None
    loss_scale: float | Tensor = 1.0
    spread: Spread | None = None
    whole: "RouteContext | None" = None
    replay: Mapping[int, Decision] | None = None
    propagate_nan: bool = False


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One layer's decision for T tokens, with what carries gradients.

    Attributes:
        ids_TK: int64, chosen experts, best first.
        weights_TK: float32 gate values that multiply the experts' outputs; they carry the router's gradient.
        wanted_TK: bool, False where a token asked for nothing: padding, or a second choice that was not drawn.
        kept_TK: bool, wanted and within capacity.
        logits_TE: float32 router logits.
        shares_TE: float32 router probabilities, where the router had them at hand; None = they follow from the logits.
        sigmoid: how they follow: as sigmoid scores divided by their sum, not as a softmax.
        aux: name → this rank's part of each loss over the global batch, before its coefficient (`balance`, `z`, ...).
        asked_TK: int64, the experts first asked, where a reroute changed some; None = ids_TK.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    wanted_TK: Tensor
    kept_TK: Tensor
    logits_TE: Tensor
    shares_TE: Tensor | None = None
    sigmoid: bool = False
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    asked_TK: Tensor | None = None

    @cached_property
    def probs_TE(self) -> Tensor:  # noqa: N802
        """Router probabilities (sigmoid routers: scores divided by their sum), found when somebody asks."""
        if self.shares_TE is not None:
            return self.shares_TE
        return sigmoid_shares(self.logits_TE) if self.sigmoid else self.logits_TE.softmax(-1)

    @cached_property
    def counts_E(self) -> Tensor:  # noqa: N802
        """int64, wanted assignments of each expert, before drops and reroutes; found when somebody asks."""
        return count(self.decision.choice, self.wanted_TK, self.logits_TE.shape[1])

    @property
    def decision(self) -> Decision:
        """What a replay needs."""
        return Decision(ids_TK=self.ids_TK, wanted_TK=self.wanted_TK, kept_TK=self.kept_TK, asked_TK=self.asked_TK)

    def detach(self) -> "Routing":
        """The same numbers without gradients."""
        return pytree.tree_map_only(Tensor, Tensor.detach, self)


def _flatten(routing: Routing) -> tuple[list[Any], bool]:
    return [getattr(routing, name) for name in TENSORS], routing.sigmoid


def _unflatten(values: Any, sigmoid: bool) -> Routing:
    return Routing(**dict(zip(TENSORS, values, strict=True)), sigmoid=sigmoid)


TENSORS = tuple(f.name for f in fields(Routing) if f.name != "sigmoid")


pytree.register_pytree_node(Routing, _flatten, _unflatten, serialized_type_name="turnout.Routing")


def count(ids_TK: Tensor, wanted_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how many wanted assignments each expert has."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_TK.device)
    return counts_E.scatter_add_(0, ids_TK.flatten(), wanted_TK.flatten().long())


def valid_tokens(context: RouteContext, tokens: int, device: torch.device) -> Tensor:
    """bool [T]: the tokens that are not padding."""
    if context.valid_T is None:
        return torch.ones(tokens, dtype=torch.bool, device=device)
    return context.valid_T


def group_starts(context: RouteContext, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The groups as (cu_groups [G+1] int64, group id of each token [T] int64)."""
    if context.cu_groups is None:
        return torch.tensor([0, tokens], device=device), torch.zeros(tokens, dtype=torch.int64, device=device)
    cu = context.cu_groups.to(device=device, dtype=torch.int64)
    group_T = torch.repeat_interleave(torch.arange(cu.numel() - 1, device=device), cu.diff(), output_size=tokens)
    return cu, group_T
