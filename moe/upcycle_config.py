"""How a dense model becomes a sparse one: a frozen dataclass, validated at birth. No torch here."""

from dataclasses import dataclass, replace
from typing import Literal

from ..configs.typed import check, check_choices
from .config import ModelConfig
from .layer_config import MoEConfig, at_least, divisors


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Sparse upcycling (Komatsuzaki et al. 2212.05055), fine-grained by virtual groups (He et al. 2410.07524 §3.2).

    Args:
        num_experts: E of a sparse block; null = the model stays as it is.
        top_k: k; null = 1 (switch), or twice the granularity: every token then sees two copies of the dense network.
        granularity: G, shards that the dense network is cut into; an expert is a copy of one shard.
        router: `topk_softmax` (renormalised) or `switch` (top-1).
        every: as `moe.every`; 2 replaces half of the blocks, as the paper does.
        first_dense: as `moe.first_dense`.
        sparse_layers: as `moe.sparse_layers`.
        noise: σ of what is added to every expert's matrices, as a share of the matrix's own; 0 = the experts are equal.
        seed: of routers and noise.
    """

    num_experts: int | None = None
    top_k: int | None = None
    granularity: int = 1
    router: Literal["topk_softmax", "switch"] = "topk_softmax"
    every: int = 2
    first_dense: int = 0
    sparse_layers: tuple[int, ...] | None = None
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self, "upcycle")
        at_least("upcycle", "granularity", self.granularity, 1)
        noise = self.noise
        check(0 <= noise < 1, "upcycle.noise", noise, "must lie in [0, 1)", "use 0.02, or 0 for equal experts")
        if self.num_experts is None:
            given = next((name for name in ("top_k", "sparse_layers") if getattr(self, name) is not None), None)
            rule, fix = "needs upcycle.num_experts, which is null", "use upcycle.num_experts=8"
            check(given is None, f"upcycle.{given}", given and getattr(self, given), rule, fix)
            return
        shards, experts, top_k = self.granularity, self.num_experts, self.chosen
        at_least("upcycle", "num_experts", experts, 2)
        rule = f"must be a multiple of upcycle.granularity ({shards}): as many copies of every shard"
        check(experts % shards == 0, "upcycle.num_experts", experts, rule, f"use {-(-experts // shards) * shards}")
        if self.router == "switch":
            check(top_k == 1, "upcycle.top_k", top_k, "must be 1 for upcycle.router=switch", "use upcycle.top_k=1")
            rule, fix = "gives a token one shard of several under upcycle.router=switch", "use upcycle.granularity=1"
            check(shards == 1, "upcycle.granularity", shards, rule, f"{fix}, or upcycle.router=topk_softmax")
            return
        rule = "gives every token the weight 1 under a renormalised softmax, so the router would learn nothing"
        check(top_k > 1, "upcycle.top_k", top_k, rule, "use upcycle.top_k=2, or upcycle.router=switch")
        rule = f"must be a multiple of upcycle.granularity ({shards}): a token needs every shard equally often"
        check(top_k % shards == 0, "upcycle.top_k", top_k, rule, f"use {-(-top_k // shards) * shards}")
        rule = f"can not exceed upcycle.num_experts ({experts})"
        check(top_k <= experts, "upcycle.top_k", top_k, rule, "lower it or add experts")

    @property
    def chosen(self) -> int:
        """k."""
        return self.top_k or (1 if self.router == "switch" else 2 * self.granularity)

    @property
    def scale(self) -> float:
        """Factor on the experts' output matrices: a token's weights on the copies of ONE shard times it are 1.

        A renormalised softmax gives a token 1 in all and 1 / G on each shard; Switch's gate is p = 1 / E at the start.
        """
        return float(self.num_experts or 1) if self.router == "switch" else float(self.granularity)

    def sparse(self, dense: ModelConfig) -> ModelConfig:
        """What `dense` becomes: dropless, with its router's own losses.

        Raises:
            ConfigError: `dense` is sparse already, has an encoder, or can not be cut.
        """
        rule = "is in the model already, and only a dense one can be made sparse"
        check(dense.moe is None, "model.moe", "set", rule, "use upcycle.num_experts=null, or a dense checkpoint")
        rule = "has feed-forward networks that upcycling leaves alone"
        check(dense.encoder is None, "model.encoder", "set", rule, "use a decoder-only model")
        width, rule = dense.ffn_width, f"must divide model.ffn_width ({dense.ffn_width})"
        check(width % self.granularity == 0, "upcycle.granularity", self.granularity, rule, f"use {divisors(width)}")
        check(self.num_experts is not None, "upcycle.num_experts", None, "must be set", "use upcycle.num_experts=8")
        moe = MoEConfig(
            width=dense.width, expert_width=width // self.granularity, num_experts=self.num_experts or 0,
            top_k=self.chosen, router=self.router, activation=dense.activation, capacity_factor=None,
            eval_capacity_factor=None, every=self.every, first_dense=self.first_dense,
            sparse_layers=self.sparse_layers,
        )  # fmt: skip
        return replace(dense, moe=moe)
