"""What a MoE layer and a decoder are: two frozen dataclasses, validated at birth. No torch here."""

from dataclasses import dataclass
from typing import Literal

from ..configs.typed import check


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A sparse mixture-of-experts layer: router, capacity, balance, experts.

    `capacity_factor: None` is dropless. In evaluation the capacity comes from `capacity_tokens` (the training row
    length), never from the length at hand, so a token's fate depends on earlier tokens of its own sequence only.
    """

    width: int
    expert_width: int
    num_experts: int = 8
    top_k: int = 1
    router: Literal["switch", "gshard"] = "switch"
    activation: Literal["swiglu", "relu", "gelu"] = "swiglu"
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = 2.0
    capacity_tokens: int | None = None
    min_capacity: int = 4
    drop_order: Literal["token_major", "choice_major"] = "token_major"
    balance_loss: float = 1e-2
    z_loss: float = 1e-3
    jitter: float = 0.0
    second_policy: Literal["random", "all"] = "random"
    shared_experts: int = 0
    every: int = 2
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        for name in ("width", "expert_width", "num_experts", "top_k", "every"):
            _at_least("moe", name, getattr(self, name), 1)
        for name in ("min_capacity", "shared_experts"):
            _at_least("moe", name, getattr(self, name), 0)
        rule = f"can not exceed moe.num_experts ({self.num_experts})"
        check(self.top_k <= self.num_experts, "moe.top_k", self.top_k, rule, "lower it or add experts")
        wanted = {"switch": 1, "gshard": 2}[self.router]
        rule = f"must be {wanted} for moe.router={self.router}"
        check(self.top_k == wanted, "moe.top_k", self.top_k, rule, f"use moe.top_k={wanted} or another router")
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            fix = "use 1.25, or null for dropless"
            check(value is None or 0 < value < float("inf"), f"moe.{name}", value, "must be positive", fix)
        fix = "use the training row length"
        check(
            self.capacity_tokens is None or self.capacity_tokens >= 1,
            "moe.capacity_tokens", self.capacity_tokens, "must be at least 1", fix,
        )  # fmt: skip
        for name in ("balance_loss", "z_loss", "init_scale"):
            value = getattr(self, name)
            check(0 <= value < float("inf"), f"moe.{name}", value, "must be zero or positive", "use 0 to switch it off")
        check(0 <= self.jitter < 1, "moe.jitter", self.jitter, "must lie in [0, 1)", "use 0.01 (Switch) or 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer whose feed-forward slots are dense or, every `moe.every`-th block, sparse."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    max_seq_len: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    eos_token_id: int | None = None
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn_width", "max_seq_len"):
            _at_least("model", name, getattr(self, name), 1)
        rule, divisors = f"must divide model.heads ({self.heads})", _divisors(self.heads)
        check(self.heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads, rule, f"use {divisors}")
        check(
            self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "must be even (rotary pairs)", "use an even size"
        )
        check(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "must be positive", "use 10000")
        check(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "must be positive", "use 1e-5")
        eos = self.eos_token_id
        rule = f"must lie in the vocabulary (0 to {self.vocab_size - 1})"
        check(eos is None or 0 <= eos < self.vocab_size, "model.eos_token_id", eos, rule, "use the tokenizer's id")
        if self.moe is not None:
            rule = f"must equal model.width ({self.width})"
            check(self.moe.width == self.width, "moe.width", self.moe.width, rule, "leave it to follow model.width")
            rule = f"leaves no MoE block in model.layers ({self.layers})"
            check(self.moe.every <= self.layers, "moe.every", self.moe.every, rule, "lower it or add layers")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The ids of the sparse blocks: the last of every `moe.every` (GShard §2.2: every other)."""
        if self.moe is None:
            return ()
        return tuple(i for i in range(self.layers) if (i + 1) % self.moe.every == 0)


def _at_least(group: str, name: str, value: int, least: int) -> None:
    check(value >= least, f"{group}.{name}", value, f"must be at least {least}", f"use {group}.{name}={least} or more")


def _divisors(n: int) -> str:
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]
