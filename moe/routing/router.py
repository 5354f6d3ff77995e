"""What all routers share, in the order in which it happens: score, decide, weigh, measure; one `Routing` out.

A router is a Module because it has weights; what makes it THIS router are three methods that subclasses define:

    score   hidden states → `Scores`       differentiable
    select  `Scores` → ids, wanted         the decision, no gradient; then capacity drops
    weigh   `Scores`, ids → weights        differentiable

In evaluation, where nothing is dropped and no loss is measured, a router that has a `rule` is one operation instead.

The decision is made once: recomputation and replay take the recorded one and only score and weigh again. The whole
computation is float32 whatever surrounds it ("selective precision", Switch 2101.03961 §2.4), and the router's
parameters stay float32 when the model around them is cast. `moe.router_dtype=bfloat16`, for comparison, scores in
bfloat16; what follows reads those numbers in float32.

T tokens, D width, E experts, K choices, G groups.
"""

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import NonFiniteError
from ...kernels import linear, top_k_gates, uniform
from ...kernels.random import JITTER
from ...kernels.reference.gates import top_k_lowest_index
from ...kernels.reference.precision import exact, wide
from ...parallel.spread import Spread
from ..config import MoEConfig
from .capacity import Room, keep
from .losses import Span, measure
from .recompute import recall, remember
from .record import Decision, RouteContext, Routing, group_starts, valid_tokens


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a router thinks of T tokens; [T, E], all in the router's dtype, then `widened` to float32.

    Attributes:
        logits: before any noise or bias.
        probs: the distribution that losses and metrics see: softmax, or s / Σ s for sigmoid scores.
        rank: what selection sorts by (logits, noisy logits, biased scores); None = logits.
        gates: what weights are read from; None = probs.
        noise: standard deviation of the noise in `rank` (noisy top-k); None without any.
    """

    logits: Tensor
    probs: Tensor
    rank: Tensor
    gates: Tensor
    noise: Tensor | None = None

    def widened(self) -> "Scores":
        """The same numbers in float32 (float64 ones as they are), so that nothing after them rounds again."""
        return Scores(**{f.name: wide(value) for f in fields(self) if (value := getattr(self, f.name)) is not None})

    def gathered(self, spread: Spread) -> "Scores":
        """Those of all the row's tokens, in order, without gradients; one collective over the row."""
        mine = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        different = list({id(value): value for value in mine.values()}.values())  # one tensor may have two names
        parts = spread.gather(torch.cat(different, -1)).split([value.shape[-1] for value in different], -1)
        theirs = {id(value): part for value, part in zip(different, parts, strict=True)}
        return Scores(**{name: theirs[id(value)] for name, value in mine.items()})


class Router(nn.Module, ABC):
    """Base of the routers: `forward(x_TD, context) -> Routing`.

    Attributes:
        weight: float32 [E, D], truncated normal with σ = sqrt(init_scale / D).
        causal: a token's choice depends on earlier tokens of its group only, in evaluation too.
        dropless: takes no part in capacity: nothing is ever dropped.
        needs_loss: collapses onto few experts unless a balance loss is set.
    """

    causal: ClassVar[bool] = True
    dropless: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = True

    weight: nn.Parameter

    def __init__(self, cfg: MoEConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.build()
        self.reset_parameters()

    # What a subclass may define ---------------------------------------------------------------------------------------

    def build(self) -> None:
        """Make the parameters and buffers, all float32."""
        self.weight = nn.Parameter(torch.empty(self.cfg.num_experts, self.cfg.width, dtype=torch.float32))

    def variance(self, name: str) -> float:
        """The variance that parameter `name` is drawn with; 0 = it starts at zero."""
        return self.cfg.init_scale / self.cfg.width

    def score(self, x_TD: Tensor, context: RouteContext) -> Scores:
        """x of `dtype` → scores. The base: softmax of the logits, ranked by logits, weighed by probabilities."""
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        return Scores(logits=logits_TE, probs=probs_TE, rank=logits_TE, gates=probs_TE)

    def select(self, scores: Scores, context: RouteContext) -> tuple[Tensor, Tensor]:
        """(ids_TK int64, wanted_TK bool). The base: the k highest ranks. Runs without gradients."""
        ids_TK = top_k_lowest_index(scores.rank, self.cfg.top_k)
        return ids_TK, torch.ones_like(ids_TK, dtype=torch.bool)

    def weigh(self, scores: Scores, ids_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """weights_TK, differentiable. The base: the gates of the chosen experts, as they are."""
        return scores.gates.gather(1, ids_TK)

    def rule(self) -> Mapping[str, Any] | None:
        """The options of `top_k_gates` that make it score, select and weigh as this router does; None = none do."""
        return None

    # What all of them do ----------------------------------------------------------------------------------------------

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        """Route T tokens.

        Args:
            x_TD: hidden states, any floating type.
            context: groups, valid tokens, random keys, perhaps a recorded decision.

        Raises:
            NonFiniteError: a valid token's scores hold a NaN (unless `context.propagate_nan`, or under torch.compile).
        """
        if context.valid_T is not None:  # padding may hold anything, and 0 · NaN in a backward pass is NaN
            x_TD = x_TD.masked_fill(~context.valid_T[:, None], 0)
        with exact(x_TD):
            x_TD, rule = x_TD.to(self.dtype), None if self.narrow else self.rule()
            if rule is not None and not self.training and self.unlimited(context):
                return self.gate(x_TD, rule, context)
            valid_T = valid_tokens(context, x_TD.shape[0], x_TD.device)
            scores = self.score(self.jitter(x_TD, context), context).widened()
            self.refuse_nan(scores, valid_T, context)
            recalled = recall(self)
            recorded = recalled or (context.replay or {}).get(self.layer)
            decision = recorded or self.decide(scores, valid_T, context)
            weights_TK = self.weigh(scores, decision.ids_TK, decision.kept_TK)
            aux, sums = self.losses(scores, weights_TK, decision, valid_T, context) if self.training else ({}, {})
        if recalled is None:
            remember(self, replace(decision, sums=sums))
        return Routing(
            ids_TK=decision.ids_TK, weights_TK=weights_TK, wanted_TK=decision.wanted_TK, kept_TK=decision.kept_TK,
            logits_TE=scores.logits, shares_TE=scores.probs, aux=aux, asked_TK=decision.asked_TK,
        )  # fmt: skip

    def gate(self, x_TD: Tensor, rule: Mapping[str, Any], context: RouteContext) -> Routing:
        """Route without noise, drops and losses: all in one operation."""
        scores = None if context.propagate_nan else self.score(x_TD, context)
        if scores is not None:
            self.refuse_nan(scores, valid_tokens(context, len(x_TD), x_TD.device), context)
        logits_TE = self.logits(x_TD) if scores is None else scores.logits
        again = torch.is_grad_enabled()  # nothing else is computed again
        recalled = recall(self) if again else None
        recorded = recalled or (context.replay or {}).get(self.layer)
        known_TK = None if recorded is None else recorded.ids_TK
        ids_TK, weights_TK = top_k_gates(logits_TE, self.cfg.top_k, ids_TK=known_TK, **rule)
        decision = recorded
        if decision is None:
            wanted_TK = torch.ones(ids_TK.shape, dtype=torch.bool, device=ids_TK.device)
            wanted_TK = wanted_TK if context.valid_T is None else wanted_TK & context.valid_T[:, None]
            decision = Decision(ids_TK=ids_TK, wanted_TK=wanted_TK, kept_TK=wanted_TK)
        if again and recalled is None:
            remember(self, decision)
        return Routing(
            ids_TK=decision.ids_TK, weights_TK=weights_TK, wanted_TK=decision.wanted_TK, kept_TK=decision.kept_TK,
            logits_TE=logits_TE, sigmoid=rule.get("score") == "sigmoid", asked_TK=decision.asked_TK,
        )  # fmt: skip

    @torch.no_grad()
    def decide(self, scores: Scores, valid_T: Tensor, context: RouteContext) -> Decision:
        """Select, then apply the present mode's capacity.

        Where a group's tokens are spread over ranks and look at each other, every rank decides for all of them, as one
        rank would, and takes its own.
        """
        if context.spread is not None and self.looks_around(context):
            assert context.whole is not None, "a spread row comes with the surroundings of all its tokens"
            valid_W = valid_tokens(context.whole, len(context.spread.order_W), valid_T.device)
            whole = self.decide(scores.gathered(context.spread), valid_W, context.whole)
            return whole.of(context.spread.own_T)
        ids_TK, wanted_TK = self.select(scores, context)
        wanted_TK = wanted_TK & valid_T[:, None]
        factor = self.factor()
        if factor is None or self.unlimited(context):
            return Decision(ids_TK=ids_TK, wanted_TK=wanted_TK, kept_TK=wanted_TK)
        room = self.room(valid_T, factor, context)
        found_TK, kept_TK = keep(
            ids_TK, wanted_TK, room, order=self.cfg.drop_order if self.training else "token_major",
            gates_TE=scores.gates, rank_TE=scores.rank, reroute=self.cfg.reroute if self.training else 0,
            draw=lambda purpose: self.draw(ids_TK.shape[0], context, purpose, ids_TK.shape[1], ids_TK.device),
        )  # fmt: skip
        asked_TK = None if found_TK is ids_TK else ids_TK
        return Decision(ids_TK=found_TK, wanted_TK=wanted_TK, kept_TK=kept_TK, asked_TK=asked_TK)

    def unlimited(self, context: RouteContext) -> bool:
        """Whether nothing is ever dropped in the present mode."""
        return self.dropless or context.dropless or self.factor() is None

    def looks_around(self, context: RouteContext) -> bool:
        """Whether a decision of the present mode depends on other tokens of its group."""
        return (self.compares_tokens or not self.unlimited(context)) and not (
            self.cfg.group == "rank" and self.training
        )

    @property
    def compares_tokens(self) -> bool:
        """Whether selection alone, before any drop, depends on other tokens."""
        return False

    @property
    def causal_in_training(self) -> bool:
        """Whether a token's experts and slots depend on earlier tokens of its group only, while training."""
        order, top_k = self.cfg.drop_order, self.cfg.top_k
        ordered = order == "token_major" or (order == "choice_major" and top_k == 1)
        drops = self.cfg.capacity_factor is not None and not self.dropless
        return self.causal and (not drops or (ordered and not self.cfg.reroute))

    def factor(self) -> float | None:
        """The capacity factor of the present mode; None = dropless."""
        return self.cfg.capacity_factor if self.training else self.cfg.eval_capacity_factor

    def room(self, valid_T: Tensor, factor: float, context: RouteContext) -> Room:
        """Each expert's slots in each group, from its valid tokens; in evaluation from `capacity_tokens`."""
        cfg = self.cfg
        groups = RouteContext() if cfg.group == "rank" and self.training else context
        cu_groups, group_T = group_starts(groups, len(valid_T), valid_T.device)
        tokens_G = torch.zeros_like(cu_groups[1:]).index_add_(0, group_T, valid_T.long())
        if not self.training and cfg.capacity_tokens is not None:
            tokens_G = torch.full_like(tokens_G, cfg.capacity_tokens)
        taken_GE = None if context.taken is None else context.taken[self.layer]
        return Room.of(group_T, tokens_G, cfg.top_k, cfg.num_experts, factor, cfg.min_capacity, taken_GE)

    def losses(
        self, scores: Scores, weights_TK: Tensor, decision: Decision, valid_T: Tensor, context: RouteContext
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This rank's part of each loss before its coefficient, and the sums over ranks that they used."""
        span = Span(
            layer=self.layer, valid_T=valid_T, context=context, known=decision.sums, group=self.cfg.balance_over
        )
        aux = {name: measure(name, self.cfg, scores, weights_TK, decision, span) for name in self.cfg.losses}
        return aux, span.sums

    @property
    def dtype(self) -> torch.dtype:
        """What the router scores in: `moe.router_dtype`; for float32 float64 when its weight is."""
        return torch.bfloat16 if self.narrow else torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def narrow(self) -> bool:
        """Whether it scores in less than float32."""
        return self.cfg.router_dtype != "float32"

    def logits(self, x_TD: Tensor) -> Tensor:
        """x · Wᵀ."""
        return linear(x_TD, self.weight.to(x_TD.dtype))

    def refuse_nan(self, scores: Scores, valid_T: Tensor, context: RouteContext) -> None:
        """Raise on a NaN of a valid token: it must never become a silent choice.

        An infinite logit is NaN in the probabilities; noise or a bias that is NaN is so in the rank only.
        """
        if context.propagate_nan or torch.compiler.is_compiling():
            return
        bad_T = (scores.probs.isnan() | scores.rank.isnan()).any(-1) & valid_T
        if bad_T.any():
            first = int(bad_T.nonzero()[0])
            raise NonFiniteError(
                f"router logits of layer {self.layer} (NaN for {int(bad_T.sum())} of {len(bad_T)} tokens, first token "
                f"{first}) must be numbers: look for a diverged weight or a non-finite input"
            )

    def jitter(self, x_TD: Tensor, context: RouteContext) -> Tensor:
        """Multiply the router's input by U(1 − ε, 1 + ε), in training only (Switch §2.2)."""
        if not (self.training and self.cfg.jitter):
            return x_TD
        draw_TD = self.draw(x_TD.shape[0], context, JITTER, x_TD.shape[1], x_TD.device)
        return x_TD * (1 + self.cfg.jitter * (2 * draw_TD.to(x_TD.dtype) - 1))

    def draw(
        self, tokens: int, context: RouteContext, purpose: int, count: int, device: torch.device,
        source: Callable[..., Tensor] = uniform,
    ) -> Tensor:  # fmt: skip
        """Random numbers [T, count] of `source`, keyed by (seed, step, layer, global token index, purpose)."""
        index_T = torch.arange(tokens, device=device) if context.index_T is None else context.index_T
        return source(context.seed, index_T, step=context.step, layer=self.layer, purpose=purpose, count=count)

    def reset_parameters(self) -> None:
        """Draw the parameters afresh (Switch §2.4: truncated normal, small scale); buffers become zero."""
        for name, parameter in self.named_parameters():
            std = self.variance(name) ** 0.5
            if std:
                nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.zeros_(parameter)
        for buffer in self.buffers():
            nn.init.zeros_(buffer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()`, `.bfloat16()` move the router but never narrow it below float32."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if narrow else moved

        return super()._apply(keep_wide, recurse)
