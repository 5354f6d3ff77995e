"""What a MoE layer is: a frozen dataclass, validated at birth. No torch here."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..configs.typed import check, check_choices

RouterName = Literal[
    "dense", "softmax", "noisy_topk", "gshard", "switch", "topk_softmax", "gpt_oss", "deepseek_v2", "deepseek_v3",
    "expert_choice", "sinkhorn", "hash",
]  # fmt: skip
Activation = Literal["swiglu", "relu", "gelu", "swiglu_clamped"]
OFF: dict[str, Any] = {"balance_loss": 0.0, "z_loss": 0.0}

# What a router's own paper uses, where that differs from BASE; every `auto` field of MoEConfig that is left null.
BASE: dict[str, Any] = {
    "top_k": 2, "renormalize": False, "balance_loss": 1e-2, "sequence_loss": 0.0, "importance_loss": 0.0,
    "load_loss": 0.0, "z_loss": 1e-3, "bias_rate": 0.0,
}  # fmt: skip
PAPER: dict[str, dict[str, Any]] = {
    "dense": OFF,  # Jacobs et al. 1991: every expert, no balance; top_k follows num_experts
    "softmax": {},  # Shazeer 2017 eq. 2
    "noisy_topk": {**OFF, "importance_loss": 0.1, "load_loss": 0.1},  # Shazeer 2017 eq. 3-11
    "gshard": {},
    "switch": {"top_k": 1},
    "topk_softmax": {"renormalize": True},  # Mixtral, Qwen3-MoE; Qwen2-MoE and OLMoE say false
    "gpt_oss": {},
    "deepseek_v2": {},
    "deepseek_v3": {**OFF, "renormalize": True, "sequence_loss": 1e-4, "bias_rate": 1e-3},
    "expert_choice": OFF,
    "sinkhorn": {**OFF, "top_k": 1},
    "hash": {**OFF, "top_k": 1},
}
TOP_K = {"switch": 1, "gshard": 2, "hash": 1}
# Routers whose load needs no loss: a balance loss beside them would fight what they compute.
SELF_BALANCED = {
    "dense": "every expert takes every token",
    "expert_choice": "every expert takes its share of tokens",
    "sinkhorn": "its assignment is balanced by construction",
    "hash": "its assignment is fixed",
}
# Settings that only some routers read: setting them beside another router would change nothing, so it is an error.
READ_BY: dict[str, tuple[str, ...]] = {
    "renormalize": ("topk_softmax", "deepseek_v2", "deepseek_v3"),
    "renormalize_kept": ("gshard",),
    "second_policy": ("gshard",),
    "second_threshold": ("gshard",),
    "expert_groups": ("deepseek_v2", "deepseek_v3"),
    "top_groups": ("deepseek_v2", "deepseek_v3"),
    "route_scale": ("deepseek_v2", "deepseek_v3"),
    "bias_rate": ("deepseek_v3",),
    "load_loss": ("noisy_topk",),
}
COEFFICIENTS = (
    "balance_loss", "sequence_loss", "global_batch_loss", "device_loss", "importance_loss", "load_loss", "z_loss",
)  # fmt: skip


def auto() -> Any:
    """A field that null leaves to the router's paper (`PAPER`); after validation it holds a value, never None."""
    return field(default=None, metadata={"auto": True})


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A sparse mixture-of-experts layer: router, capacity, balance, experts.

    Args:
        width: D, of the hidden states.
        expert_width: F, hidden width of one expert.
        num_experts: E.
        top_k: k, experts a token; null = 1 (switch, sinkhorn, hash), all (dense) or 2.
        router: how tokens find experts; docs/routing.md has a row for each.
        activation: of the experts: `swiglu`, `relu`, `gelu`, or `swiglu_clamped` (GPT-OSS: gate and up at most 7,
            (up + 1) · gate · sigmoid(1.702 · gate)).
        bias: biases on both of an expert's matrices (GPT-OSS).
        capacity_factor: in training; null = dropless.
        eval_capacity_factor: in evaluation; null = dropless.
        capacity_tokens: row length from which the capacity in evaluation is computed (never from the length at hand, so
            a token's fate depends on earlier tokens of its own sequence only); null = the group at hand.
        min_capacity: slots that an expert has at least.
        group: tokens that share capacity: the packed `row` (or sequence), or all that this `rank` has at hand, which
            depends on the layout and exists for comparison.
        drop_order: who finds a slot first in training: `token_major` (causal), `choice_major` (GShard), `probability`
            (highest gate) or `random`. In evaluation always token_major.
        reroute: rounds in which dropped assignments are retried at the next best expert, in training
            (no-token-left-behind, Switch appendix B).
        renormalize: divide the k weights by their sum; null = the router's paper's.
        renormalize_kept: gshard: divide by the sum of the kept weights after dropping (DeepSpeed).
        second_policy: gshard: when the second expert is used: `random` (with probability g2 / second_threshold), `all`,
            `threshold` (g2 > second_threshold), `none`, or `gumbel` (always, itself drawn: DeepSpeed).
        second_threshold: gshard: 0.5 in GShard (probability 2 · g2), 0.2 in Mesh TensorFlow.
        expert_groups: deepseek: groups of experts of which a token may use only `top_groups`.
        top_groups: deepseek: see expert_groups.
        route_scale: deepseek: factor on the weights (routed_scaling_factor).
        bias_rate: deepseek_v3: γ of the loss-free bias, moved once an optimizer step; 0 = it stands still.
        balance_loss: coefficient of Switch's and GShard's E · Σ f_i P_i, at `balance_over`.
        balance_over: tokens whose statistics balance_loss, device_loss, importance_loss and load_loss take: each
            packed row (`sequence`), the optimizer step (`global_batch`; under accumulation its micro-batches so far),
            or what one rank has at hand (`micro_batch`, which depends on the layout).
        sequence_loss: coefficient of the same per row (DeepSeek-V3 eq. 17), whatever balance_over says.
        global_batch_loss: coefficient of the same over the optimizer step (2501.11873), whatever balance_over says.
        device_loss: coefficient of the same over `device_groups` groups of experts (DeepSeekMoE).
        device_groups: neighbouring experts form that many groups.
        importance_loss: coefficient of CV²(Σ gates) (Shazeer 2017 eq. 6).
        load_loss: noisy_topk: coefficient of CV²(smooth load) (Shazeer 2017 eq. 10).
        z_loss: coefficient of the mean squared logsumexp of the logits (ST-MoE eq. 5).
        router_dtype: what the router rounds its input, weight, logits and probabilities to, in training and serving
            alike; `float32` is Switch's selective precision (§2.4), `bfloat16` what it was compared with.
        jitter: ε of the router input's U(1 - ε, 1 + ε) in training (Switch).
        expert_dropout: share of hidden units dropped inside the experts in training (Switch §2.4).
        shared_experts: dense experts beside the routed ones (DeepSeekMoE).
        shared_width: hidden width of all shared experts together; null = shared_experts · expert_width.
        shared_gate: multiply the shared output by sigmoid(x · w) (Qwen2-MoE).
        every: one block of so many is sparse, the last of each (1 = all).
        first_dense: so many first blocks are dense in any case.
        sparse_layers: ids of the sparse blocks; null = as `every` and `first_dense` say.
        noncausal: allow a router that looks at later tokens in a decoder.
        init_scale: s of the initial σ = sqrt(s / fan_in).
    """

    width: int
    expert_width: int
    num_experts: int = 8
    top_k: int = auto()
    router: RouterName = "switch"
    activation: Activation = "swiglu"
    bias: bool = False
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = 2.0
    capacity_tokens: int | None = None
    min_capacity: int = 4
    group: Literal["row", "rank"] = "row"
    drop_order: Literal["token_major", "choice_major", "probability", "random"] = "token_major"
    reroute: int = 0
    renormalize: bool = auto()
    renormalize_kept: bool = False
    second_policy: Literal["random", "all", "threshold", "none", "gumbel"] = "random"
    second_threshold: float = 0.5
    expert_groups: int = 1
    top_groups: int = 1
    route_scale: float = 1.0
    bias_rate: float = auto()
    balance_loss: float = auto()
    balance_over: Literal["sequence", "global_batch", "micro_batch"] = "sequence"
    sequence_loss: float = auto()
    global_batch_loss: float = 0.0
    device_loss: float = 0.0
    device_groups: int = 1
    importance_loss: float = auto()
    load_loss: float = auto()
    z_loss: float = auto()
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    jitter: float = 0.0
    expert_dropout: float = 0.0
    shared_experts: int = 0
    shared_width: int | None = None
    shared_gate: bool = False
    every: int = 2
    first_dense: int = 0
    sparse_layers: tuple[int, ...] | None = None
    noncausal: bool = False
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        check_choices(self, "moe")
        paper = {**BASE, **PAPER[self.router]}
        paper["top_k"] = self.num_experts if self.router == "dense" else min(paper["top_k"], self.num_experts)
        for name, value in paper.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_sizes()
        self._check_choice()
        self._check_capacity()
        self._check_balance()

    def _check_sizes(self) -> None:
        for name in ("width", "expert_width", "num_experts", "top_k", "every", "expert_groups", "device_groups"):
            at_least("moe", name, getattr(self, name), 1)
        for name in ("min_capacity", "shared_experts", "first_dense", "reroute"):
            at_least("moe", name, getattr(self, name), 0)
        check(0 <= self.jitter < 1, "moe.jitter", self.jitter, "must lie in [0, 1)", "use 0.01 (Switch) or 0")
        rate = self.expert_dropout
        check(0 <= rate < 1, "moe.expert_dropout", rate, "must lie in [0, 1)", "use 0.4 (Switch, fine-tuning) or 0")
        scale = 0 <= self.init_scale < float("inf")
        check(scale, "moe.init_scale", self.init_scale, "must be zero or positive", "use 0.1 (Switch) or 1.0")
        if self.shared_width is not None:
            at_least("moe", "shared_width", self.shared_width, 1)
        for name in ("shared_width", "shared_gate"):
            rule = "needs moe.shared_experts of at least 1"
            value = getattr(self, name)
            check(self.shared_experts > 0 or not value, f"moe.{name}", value, rule, "use moe.shared_experts=1")

    def _check_choice(self) -> None:
        for name, routers in READ_BY.items():
            value, own = getattr(self, name), {**BASE, **PAPER[self.router]}.get(name, _default(name))
            rule = f"is not read by moe.router={self.router}"
            read = self.router in routers or value == own
            check(read, f"moe.{name}", value, rule, f"leave it out, or use moe.router={routers[0]}")
        rule = f"can not exceed moe.num_experts ({self.num_experts})"
        check(self.top_k <= self.num_experts, "moe.top_k", self.top_k, rule, "lower it or add experts")
        wanted = self.num_experts if self.router == "dense" else TOP_K.get(self.router, self.top_k)
        rule = f"must be {wanted} for moe.router={self.router}"
        check(self.top_k == wanted, "moe.top_k", self.top_k, rule, f"use moe.top_k={wanted} or another router")
        rule = f"gives every token the weight 1 under moe.router={self.router}, so the router would learn nothing"
        sums_to_one = self.renormalize or self.router in ("noisy_topk", "gpt_oss")
        learns = self.top_k > 1 or self.num_experts == 1 or not sums_to_one
        other = ", moe.renormalize=false" if self.renormalize else ""
        check(learns, "moe.top_k", self.top_k, rule, f"use moe.top_k=2{other} or moe.router=switch")
        self._check_groups()
        low, value = 0 < self.second_threshold <= 1, self.second_threshold
        check(low, "moe.second_threshold", value, "must lie in (0, 1]", "use 0.5 (GShard) or 0.2 (Mesh TensorFlow)")
        scale = 0 < self.route_scale < float("inf")
        check(scale, "moe.route_scale", self.route_scale, "must be positive", "use 1.0, or 2.5 (DeepSeek-V3)")
        rule = "scales the router's input, which moe.router=hash does not have"
        check(self.router != "hash" or self.jitter == 0, "moe.jitter", self.jitter, rule, "use moe.jitter=0")
        rule, dtype = "rounds logits, which moe.router=hash does not have", self.router_dtype
        exact = self.router != "hash" or dtype == "float32"
        check(exact, "moe.router_dtype", dtype, rule, "use moe.router_dtype=float32")

    def _check_groups(self) -> None:
        experts, groups, top = self.num_experts, self.expert_groups, self.top_groups
        rule = f"must divide moe.num_experts ({experts})"
        check(experts % groups == 0, "moe.expert_groups", groups, rule, f"use {divisors(experts)}")
        fits = experts % self.device_groups == 0
        check(fits, "moe.device_groups", self.device_groups, rule, f"use {divisors(experts)}")
        check(1 <= top <= groups, "moe.top_groups", top, f"must lie in 1 to moe.expert_groups ({groups})", "lower it")
        room, fix = top * (experts // groups), "raise moe.top_groups or lower moe.top_k"
        rule = f"can not exceed the {room} experts of the moe.top_groups ({top}) groups that a token may use"
        check(self.top_k <= room, "moe.top_k", self.top_k, rule, fix)
        rule = "leaves groups of one expert, but moe.router=deepseek_v3 scores a group by its best two"
        pairs = self.router != "deepseek_v3" or groups == 1 or experts // groups >= 2
        check(pairs, "moe.expert_groups", groups, rule, "use fewer groups")

    def _check_capacity(self) -> None:
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            fix = "use 1.25, or null for dropless"
            check(value is None or 0 < value < float("inf"), f"moe.{name}", value, "must be positive", fix)
            rule = "must be set for moe.router=expert_choice: an expert takes moe.top_k · factor · tokens / experts"
            needs = self.router == "expert_choice" and value is None
            check(not needs, f"moe.{name}", value, rule, "use 1.0")
        tokens, fix = self.capacity_tokens, "use the training row length"
        check(tokens is None or tokens >= 1, "moe.capacity_tokens", tokens, "must be at least 1", fix)
        drops = self.capacity_factor is not None and self.router not in ("dense", "expert_choice")
        given = "moe.capacity_factor=null" if self.capacity_factor is None else f"moe.router={self.router}"
        rule = f"retries dropped assignments, and {given} drops none"
        check(drops or self.reroute == 0, "moe.reroute", self.reroute, rule, "use moe.reroute=0")
        rule = f"can not exceed the {self.num_experts - self.top_k} experts that a token has not asked"
        most = self.num_experts - self.top_k
        check(self.reroute <= most, "moe.reroute", self.reroute, rule, f"use moe.reroute={most} or less")

    def _check_balance(self) -> None:
        for name in (*COEFFICIENTS, "bias_rate"):
            _not_negative(name, getattr(self, name))
        rule = f"has no place beside moe.router={self.router}: {SELF_BALANCED.get(self.router)}"
        for name in COEFFICIENTS[:-1] if self.router in SELF_BALANCED else ():
            value = getattr(self, name)
            check(value == 0, f"moe.{name}", value, rule, f"use moe.{name}=0 or another router")
        value, rule = self.z_loss, "needs router logits, which moe.router=hash does not have"
        check(self.router != "hash" or value == 0, "moe.z_loss", value, rule, "use moe.z_loss=0")
        rule = f"is undefined for moe.top_k = moe.num_experts ({self.num_experts})"
        defined = self.load_loss == 0 or self.top_k < self.num_experts
        check(defined, "moe.load_loss", self.load_loss, rule, "use moe.load_loss=0 or a smaller moe.top_k")
        rule = "needs moe.device_groups of at least 2"
        grouped = self.device_loss == 0 or self.device_groups > 1
        check(grouped, "moe.device_loss", self.device_loss, rule, "use moe.device_groups=4, or moe.device_loss=0")

    @property
    def losses(self) -> dict[str, float]:
        """Name of each loss that is computed → its coefficient; `balance` and `z` also at 0, as measures."""
        if self.router == "hash":
            return {}
        named = {name.removesuffix("_loss"): float(getattr(self, name)) for name in COEFFICIENTS}
        return {name: value for name, value in named.items() if value > 0 or name in ("balance", "z")}


def at_least(group: str, name: str, value: int, least: int) -> None:
    """Check that a size is `least` or more."""
    check(value >= least, f"{group}.{name}", value, f"must be at least {least}", f"use {group}.{name}={least} or more")


def _not_negative(name: str, value: float) -> None:
    rule = "must be zero or positive"
    check(0 <= value < float("inf"), f"moe.{name}", value, rule, "use 0 to switch it off")


def _default(name: str) -> Any:
    return next(f.default for f in fields(MoEConfig) if f.name == name)


def divisors(n: int) -> str:
    """The divisors of n, for an error message."""
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]
