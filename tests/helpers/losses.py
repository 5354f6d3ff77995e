"""One layer's tokens, scored and routed by hand, and any balance loss of them.

    case = Case.random()
    loss = case.loss("importance", over="global_batch")
    case.gradient(loss)                  # with respect to logits and noise, one vector

T tokens, E experts, K choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turnout.moe import MoEConfig, RouteContext
from turnout.moe.routing.losses import Span, measure
from turnout.moe.routing.record import Decision
from turnout.moe.routing.router import Scores

PRODUCTS = ("balance", "sequence", "global_batch", "device")
SPREADS = ("importance", "load")
LOSSES = (*PRODUCTS, *SPREADS, "z")
OVER = ("sequence", "global_batch", "micro_batch")


@dataclass(frozen=True)
class Case:
    logits: Tensor
    noise: Tensor
    scores: Scores
    ids: Tensor
    weights: Tensor

    @staticmethod
    def of(logits: Tensor, top_k: int = 1, noise: Tensor | None = None, ids: Tensor | None = None) -> "Case":
        """Noisy top-k by hand; weights are probabilities. Choices may be given."""
        sigma = torch.ones_like(logits) if noise is None else noise
        drawn = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
        rank, probs = logits + sigma * drawn, logits.softmax(-1)
        if ids is None:
            ids = rank.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        scores = Scores(logits=logits, probs=probs, rank=rank, gates=probs, noise=sigma)
        return Case(logits, sigma, scores, ids, probs.gather(1, ids))

    @staticmethod
    def random(tokens: int = 13, experts: int = 5, top_k: int = 2) -> "Case":
        """Float64 leaves: logits and noise."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
        noise = 0.2 + torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
        return Case.of(logits.requires_grad_(), top_k, noise.requires_grad_())

    def rows(self, rows: Any) -> "Case":
        """Some of the tokens; gradients still reach the whole case's leaves."""
        scores = Scores(**{name: value[rows] for name, value in vars(self.scores).items()})
        return Case(self.logits, self.noise, scores, self.ids[rows], self.weights[rows])

    def span(self, over: str, valid: Any = None, known: Mapping[str, Tensor] | None = None, **context: Any) -> Span:
        valid_T = torch.ones(len(self.ids), dtype=torch.bool) if valid is None else torch.as_tensor(valid)
        return Span(layer=0, valid_T=valid_T, context=RouteContext(**context), known=known or {}, group=over)

    def loss(self, name: str, over: str = "sequence", *, device_groups: int | None = None, **where: Any) -> Tensor:
        """Before the coefficient; as many device groups as experts unless said otherwise."""
        return self.measured(name, self.span(over, **where), device_groups)

    def measured(self, name: str, span: Span, device_groups: int | None = None) -> Tensor:
        experts, top_k = self.scores.probs.shape[1], self.ids.shape[1]
        cfg = MoEConfig(
            width=4, expert_width=4, num_experts=experts, top_k=top_k, router="softmax",
            device_groups=device_groups or experts,
        )  # fmt: skip
        wanted = torch.ones_like(self.ids, dtype=torch.bool)
        decision = Decision(ids_TK=self.ids, wanted_TK=wanted, kept_TK=wanted)
        return measure(name, cfg, self.scores, self.weights, decision, span)

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d (logits, noise), flat."""
        leaves = (self.logits, self.noise)
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in found])
