"""Balance losses, over which tokens their statistics are taken, and how their gradient is attached.

Every loss is this rank's part of a loss over the global batch; the parts of all ranks and micro-batches add up, so
plain SUM gradient reduction is right. The f · P losses are exactly 1 at perfect balance, the CV² losses 0.

T tokens, E experts, K choices, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import MoEConfig
from .record import Decision, RouteContext, group_starts

if TYPE_CHECKING:
    from .router import Scores


@dataclass(kw_only=True)
class Span:
    """The tokens that a layer's losses are about, and over which of them a statistic is taken together.

    Attributes:
        layer: the block's id.
        valid_T: bool.
        context: groups, total tokens, reducer, tally.
        known: the decision's recorded sums, when it is recalled: no sum over ranks is made again.
        group: moe.balance_over.
        sums: the sums over ranks and earlier micro-batches made so far, name → tensor without gradient.
    """

    layer: int
    valid_T: Tensor
    context: RouteContext
    known: Mapping[str, Tensor]
    group: str
    sums: dict[str, Tensor] = field(default_factory=dict)


def measure(name: str, cfg: MoEConfig, scores: "Scores", weights_TK: Tensor, decision: Decision, span: Span) -> Tensor:
    """Loss `name` (a key of `cfg.losses`), before its coefficient. Scalar float32."""
    valid_T, context = span.valid_T, span.context
    total: int | Tensor = valid_T.sum().clamp(min=1) if context.total_tokens is None else context.total_tokens
    if name == "z":
        return router_z(scores.logits, valid_T, total)
    cu, group_T = group_starts(context, len(valid_T), valid_T.device)
    return switch_balance(scores.probs, decision.ids_TK, valid_T, group_T, cu.numel() - 1, total)


def switch_balance(
    probs_TE: Tensor, ids_TK: Tensor, valid_T: Tensor, group_T: Tensor, groups: int, total_tokens: int | Tensor
) -> Tensor:
    """E · Σ_i f_i · P_i per group, then the mean weighted by valid tokens (Switch 2101.03961 eq. 4–6; GShard's l_aux).

    f_i is the share of the group's T·K assignments that chose expert i (no gradient), P_i the mean router probability.
    Exactly 1 at perfect balance and E at collapse (K = 1). Scalar float32.
    """
    tokens, top_k = ids_TK.shape
    num_experts = probs_TE.shape[1]
    valid_T1 = valid_T.to(probs_TE.dtype)[:, None]
    count_GE = probs_TE.new_zeros(groups, num_experts)
    cell_TK = group_T[:, None] * num_experts + ids_TK
    count_GE.view(-1).index_add_(0, cell_TK.reshape(-1), valid_T1.expand(tokens, top_k).reshape(-1))
    prob_GE = probs_TE.new_zeros(groups, num_experts).index_add(0, group_T, probs_TE * valid_T1)
    tokens_G = count_GE.sum(1) / top_k
    # tokens_G · (E Σ f P) with f = count / (tokens · K) and P = prob / tokens: one division is left
    weighted_G = num_experts * (count_GE * prob_GE).sum(1) / (top_k * tokens_G.clamp(min=1))
    return weighted_G.sum() / total_tokens


def router_z(logits_TE: Tensor, valid_T: Tensor, total_tokens: int | Tensor) -> Tensor:
    """Mean over valid tokens of (logsumexp_j h_tj)² (ST-MoE 2202.08906 eq. 5). Scalar float32."""
    z_T = logits_TE.logsumexp(-1).square()
    return (z_T * valid_T).sum() / total_tokens


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
