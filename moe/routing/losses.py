"""Balance losses, over which tokens their statistics are taken, and how their gradient is attached.

    E · Σ_i f_i P_i               balance, sequence, global_batch, device    1 at perfect balance, E / k at collapse
    Var_i(S_i) / Mean_i(S_i)²     importance, load                           0 at perfect balance, E / k - 1
    mean_t (logsumexp_j h_tj)²    z

Every loss is this rank's part of a loss over the global batch: the parts of all ranks and micro-batches add up, so
plain SUM gradient reduction is right. At perfect balance others print, for the same f · P loss: 1 Lingvo, Mesh
TensorFlow, DeepSpeed, Tutel, Switch, Megatron, MegaBlocks and we; k Hugging Face (it sums the k choices, and joins all
layers before the product) and flaxformer's top-k; 1 / E² GShard's paper (a mean over experts, without the factor E²).

T tokens, E experts, K choices, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...configs.typed import check
from ..config import MoEConfig
from .record import Decision, RouteContext, group_starts

if TYPE_CHECKING:
    from .router import Scores


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Σ over valid tokens of a quantity of each expert, group by group.

    Attributes:
        own_G: how many tokens of the group are at hand.
        all_GE: the sum over all tokens that count together: those at hand, in `sequence` those of a row's other ranks,
            in `global_batch` those of all ranks and of earlier micro-batches. Its gradient reaches the tokens at hand.
        all_G: how many those are.
    """

    own_G: Tensor
    all_GE: Tensor
    all_G: Tensor


@dataclass(kw_only=True)
class Span:
    """The tokens that a layer's losses are about, and which of them a statistic is taken over together.

    `sequence`: each group of the context. `micro_batch`: what is at hand; depends on the layout. `global_batch`: the
    optimizer step on all ranks, under accumulation its micro-batches so far.

    Attributes:
        layer: the block's id.
        valid_T: bool.
        context: groups, total tokens, reducer, tally.
        known: a recalled decision's sums, taken instead of summing over ranks and micro-batches again.
        group: moe.balance_over.
        sums: loss → the sums over ranks and micro-batches made so far, float [G, E+1] (G = 1 in `global_batch`), the
            last column counts tokens.
    """

    layer: int
    valid_T: Tensor
    context: RouteContext
    known: Mapping[str, Tensor]
    group: str
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int | Tensor:
        """Valid tokens of the global batch, the divisor of every loss."""
        return self.valid_T.sum().clamp(min=1) if self.context.total_tokens is None else self.context.total_tokens

    def over(self, loss: str) -> str:
        """The granularity of a loss: two carry it in their name."""
        return loss if loss in ("sequence", "global_batch") else self.group

    def add(self, loss: str, values_TE: Tensor) -> Tensor:
        """Σ over the valid tokens at hand, in the groups of `loss`: [G, E]."""
        values_TE = values_TE.masked_fill(~self.valid_T[:, None], 0)
        if self.over(loss) != "sequence" or self.context.cu_groups is None:
            return values_TE.sum(0, keepdim=True)
        cu_groups, group_T = group_starts(self.context, len(values_TE), values_TE.device)
        return values_TE.new_zeros(len(cu_groups) - 1, values_TE.shape[1]).index_add(0, group_T, values_TE)

    def gather(self, loss: str, values_TE: Tensor) -> Sums:
        """Σ over all tokens that count together; at most one reduction, none in a recalled decision."""
        own = self.add(loss, F.pad(values_TE, (0, 1), value=1.0))  # the last column counts tokens
        together = own.detach()
        spread_row = self.over(loss) == "sequence" and self.context.spread is not None
        if spread_row or self.over(loss) == "global_batch":
            self.sums[loss] = together = self.known[loss] if loss in self.known else self._reduce(loss, together)
        linked = together + (own - own.detach())  # the value of all, the gradient of those at hand
        return Sums(own_G=own[:, -1].detach(), all_GE=linked[:, :-1], all_G=together[:, -1])

    def _reduce(self, loss: str, own: Tensor) -> Tensor:
        """Σ over the ranks of a row; in `global_batch` over all ranks and earlier micro-batches, which are noted."""
        if self.over(loss) == "sequence":
            assert self.context.spread is not None
            return self.context.spread.sum(own)
        if (tally := self.context.tally) is not None:
            tally[self.layer, loss] = own = tally[self.layer, loss] + own if (self.layer, loss) in tally else own
        return own if self.context.reducer is None else self.context.reducer(own)


def measure(name: str, cfg: MoEConfig, scores: "Scores", weights_TK: Tensor, decision: Decision, span: Span) -> Tensor:
    """Loss `name` (a key of `cfg.losses`) before its coefficient: this rank's part, scalar."""
    if name == "z":
        return router_z(scores.logits, span.valid_T, span.total)
    if name == "load":
        return spread(span.gather(name, smooth_load(scores, cfg.top_k)), span.total)
    probs_TE, ids_TK = scores.probs, decision.choice
    if name == "importance":
        gates_TE = torch.zeros_like(probs_TE).scatter_add(1, decision.ids_TK, weights_TK.to(probs_TE.dtype))
        return spread(span.gather(name, gates_TE), span.total)
    chosen_TE = torch.zeros_like(probs_TE).scatter_add(1, ids_TK, torch.ones_like(ids_TK, dtype=probs_TE.dtype))
    if name == "device":
        chosen_TE, probs_TE = (by_device(x_TE, cfg.device_groups) for x_TE in (chosen_TE, probs_TE))
    return balance(span.gather(name, chosen_TE), ids_TK.shape[1], span.add(name, probs_TE), span.total)


def balance(chosen: Sums, top_k: int, probs_GE: Tensor, total: int | Tensor) -> Tensor:
    """E · Σ_i f_i P_i per group, then the mean weighted by valid tokens. Scalar.

    f_i is the share of the assignments before drops that chose expert i (no gradient), P_i the mean probability
    (Switch 2101.03961 eq. 4–6, GShard's l_aux; per row DeepSeek-V3 2412.19437 eq. 17–20; over the optimizer step
    2501.11873; over groups of experts DeepSeekMoE 2401.06066 eq. 15–18).

    Args:
        chosen: how many assignments chose each expert.
        top_k: assignments a token.
        probs_GE: Σ of the probabilities of the tokens at hand.
        total: valid tokens of the global batch.
    """
    f_GE = chosen.all_GE / (top_k * chosen.all_G.clamp(min=1))[:, None]
    return probs_GE.shape[1] * (f_GE * probs_GE).sum() / total


def spread(sums: Sums, total: int | Tensor) -> Tensor:
    """CV² of each group's sums, then the mean weighted by valid tokens (Shazeer 1701.06538 eq. 6–7, 11). Scalar.

    A group's value is shared out by the tokens at hand, so that the parts add up. Its gradient is not: each rank has
    its own tokens' gradient of the whole. It is weighted by the tokens so far, because CV² does not see their number:
    a first micro-batch would otherwise pull as hard as the whole step.
    """
    cv_G = squared_variation(sums.all_GE)
    value_G = sums.own_G * cv_G.detach()
    gradient_G = sums.all_G * (cv_G - cv_G.detach())
    return (value_G + gradient_G).sum() / total


def squared_variation(sums_GE: Tensor) -> Tensor:
    """CV² = Var / Mean² with the population variance, [G]; 0 where nothing was summed."""
    mean_square_G = sums_GE.mean(-1).square().clamp(min=torch.finfo(sums_GE.dtype).tiny)
    return sums_GE.var(-1, correction=0) / mean_square_G


def smooth_load(scores: "Scores", top_k: int) -> Tensor:
    """P(x, i): the chance that expert i is chosen if its noise alone were drawn again, [T, E], k < E.

    Φ((h_i - kth_excluding(H, k, i)) / σ_i), h the clean logits, H the noisy ones, σ the noise's standard deviation
    (Shazeer 1701.06538 eq. 8–9). kth_excluding is the k-th highest of the others: for one of the k best the (k+1)-th.
    """
    assert scores.noise is not None, "noisy top-k has noise in training"
    ranked_TE = scores.rank.sort(dim=-1, descending=True, stable=True).values
    kth_T1, next_T1 = ranked_TE[:, top_k - 1, None], ranked_TE[:, top_k, None]
    rival_TE = torch.where(scores.rank > next_T1, next_T1, kth_T1)
    sigma_TE = scores.noise.clamp(min=torch.finfo(scores.noise.dtype).eps)  # a vanished noise is a step, not 0 / 0
    return torch.special.ndtr((scores.logits - rival_TE) / sigma_TE)


def by_device(values_TE: Tensor, groups: int) -> Tensor:
    """Σ over each group of neighbouring experts: [T, groups]."""
    return values_TE.unflatten(-1, (groups, -1)).sum(-1)


def router_z(logits_TE: Tensor, valid_T: Tensor, total: int | Tensor) -> Tensor:
    """Mean over valid tokens of (logsumexp_j h_tj)² (ST-MoE 2202.08906 eq. 5). Scalar."""
    return logits_TE.logsumexp(-1).square().masked_fill(~valid_T, 0).sum() / total


def weighted_sum(coefficients: Mapping[str, float], aux: Mapping[str, Tensor], learns: bool) -> Tensor | None:
    """Σ coefficient · loss over the losses that are on; None if none is.

    Args:
        coefficients: `MoEConfig.losses`.
        aux: `Routing.aux`, in training.
        learns: the layer is being trained: its output wants a gradient.

    Raises:
        ConfigError: a loss with a coefficient would train nothing, although `learns`.
    """
    weighted = []
    for name, coefficient in coefficients.items():
        if coefficient:
            rule = "is on, but its loss has no gradient: it would be printed and never applied"
            fix = f"unfreeze the router or what feeds it, or use moe.{name}_loss=0"
            check(not learns or aux[name].requires_grad, f"moe.{name}_loss", coefficient, rule, fix)
            weighted.append(coefficient * aux[name])
    return torch.stack(weighted).sum() if weighted else None


class AttachLoss(torch.autograd.Function):
    """Identity on `y` whose backward also sends gradient 1 into `loss`.

    A loss of an inner layer then needs no way out of the model: pipeline stages and anyone's model train it alike.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_shape, ctx.loss_dtype = loss.shape, loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        return grad_y, torch.ones(ctx.loss_shape, dtype=ctx.loss_dtype, device=grad_y.device)


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """`y` unchanged; in the backward pass `loss` receives gradient 1, once per forward."""
    return AttachLoss.apply(y, loss)
