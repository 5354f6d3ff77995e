"""FLOPs of a model, from its configuration. No torch here: the trainer's `mfu` and `turnout plan` share the formula."""

from functools import cache

from .config import ModelConfig, MoEConfig


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Forward and backward: 6 per active matrix weight, 6 per head, head size and position that causal attention sees.

    (Kaplan et al. 2001.08361 §2.1; PaLM 2204.02311 appendix B, halved for the causal mask.)
    """
    return sum(flops_by_part(cfg, seq_len, tuple(range(cfg.layers))))


@cache
def flops_by_part(cfg: ModelConfig, seq_len: int, layers: tuple[int, ...]) -> tuple[float, float, float]:
    """The same of these layers' attention, of their feed-forward slots, and of the head if the last is among them."""
    attention = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads) + cfg.heads * cfg.head_dim * seq_len
    sparse = len(set(layers).intersection(cfg.moe_layers))
    dense = 3 * cfg.width * cfg.ffn_width
    routed = _sparse_weights(cfg.moe) if cfg.moe else 0.0
    head = cfg.vocab_size * cfg.width if cfg.layers - 1 in layers else 0
    return 6.0 * len(layers) * attention, 6.0 * ((len(layers) - sparse) * dense + sparse * routed), 6.0 * head


def experts_met(moe: MoEConfig) -> float:
    """Experts that a token meets in a layer; under expert choice top_k · factor of them take it, in the mean."""
    if moe.router == "expert_choice":
        return min(moe.top_k * (moe.capacity_factor or 1.0), moe.num_experts)
    return moe.top_k


def _sparse_weights(moe: MoEConfig) -> float:
    """Matrix weights of a MoE layer that a token meets: its experts', the shared ones', the gate's and the router's."""
    hidden = experts_met(moe) * moe.expert_width
    if moe.shared_experts:
        hidden += moe.shared_width or moe.shared_experts * moe.expert_width
    router = {"hash": 0, "noisy_topk": 2}.get(moe.router, 1) * moe.num_experts
    return moe.width * ((3 if moe.activation == "swiglu" else 2) * hidden + moe.shared_gate + router)
