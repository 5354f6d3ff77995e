"""FLOPs of a model, from its configuration. No torch here: the trainer's `mfu` and `turnout plan` share the formula."""

from functools import cache
from math import prod

from .config import ModelConfig, MoEConfig
from .shapes import shapes


def flops_per_token(cfg: ModelConfig, seq_len: int, source: int = 0) -> float:
    """Forward and backward: 6 per active matrix weight, 6 per head, head size and position that causal attention sees.

    (Kaplan et al. 2001.08361 §2.1; PaLM 2204.02311 appendix B, halved for the causal mask.) An encoder's work on the
    `source` tokens of a row is shared out over its `seq_len` targets.
    """
    own = sum(flops_by_part(cfg, seq_len, tuple(range(cfg.layers))))
    return own if cfg.encoder is None else own + encoder_flops(cfg, seq_len, source) / seq_len


def encoder_flops(cfg: ModelConfig, seq_len: int, source: int) -> float:
    """Of what an encoder adds to one row: its blocks, and the decoder's attention to what they return.

    Both see every token of the source: 12 per head, head size and pair.
    """
    assert cfg.encoder is not None
    heads, keys = cfg.width * cfg.head_dim * 2 * cfg.heads, cfg.width * cfg.head_dim * 2 * cfg.kv_heads
    pairs = 2 * cfg.heads * cfg.head_dim * source
    sparse = sum(layer >= cfg.layers for layer in cfg.moe_layers)
    dense = (cfg.encoder.layers - sparse) * _dense_weights(cfg)
    feed = dense + (sparse * _sparse_weights(cfg.moe) if cfg.moe else 0.0)
    blocks = source * (cfg.encoder.layers * (heads + keys + pairs) + feed)
    return 6.0 * (blocks + cfg.layers * (seq_len * (heads + pairs) + source * keys))


@cache
def flops_by_part(cfg: ModelConfig, seq_len: int, layers: tuple[int, ...]) -> tuple[float, float, float]:
    """The same of these layers' attention, of their feed-forward slots, and of the head if the last is among them."""
    seen = sum(_seen(cfg, layer, seq_len) for layer in layers)
    attention = len(layers) * _attention_weights(cfg) + cfg.heads * _met(cfg) * seen
    sparse = len(set(layers).intersection(cfg.moe_layers))
    dense = _dense_weights(cfg)
    routed = _sparse_weights(cfg.moe) if cfg.moe else 0.0
    head = cfg.vocab_size * cfg.width if cfg.layers - 1 in layers else 0
    return 6.0 * attention, 6.0 * ((len(layers) - sparse) * dense + sparse * routed), 6.0 * head


def experts_met(moe: MoEConfig) -> float:
    """Experts that a token meets in a layer; under expert choice top_k · factor of them take it, in the mean."""
    if moe.router == "expert_choice":
        return min(moe.top_k * (moe.capacity_factor or 1.0), moe.num_experts)
    return moe.top_k


def _attention_weights(cfg: ModelConfig) -> int:
    """Matrix weights of an attention layer."""
    own = (shape for name, shape in shapes(cfg).items() if name.startswith("blocks.0.attention."))
    return sum(prod(shape) for shape in own if len(shape) == 2)


def _met(cfg: ModelConfig) -> int:
    """Products of a head for one query and one position: with its key and with its value, by head in training."""
    latent = cfg.attention.latent
    return 2 * cfg.head_dim if latent is None else cfg.head_dim + latent.rope_dim + latent.value_dim


def _dense_weights(cfg: ModelConfig) -> int:
    """Matrix weights of a dense feed-forward slot."""
    return _matrices(cfg.activation) * cfg.width * cfg.ffn_width


def _seen(cfg: ModelConfig, layer: int, seq_len: int) -> float:
    """Positions that a query sees, in the mean: half of a sequence, or a window that is not full at first."""
    window = min(cfg.attention.window_of(layer) or seq_len, seq_len)
    return window * (1 - window / (2 * seq_len))


def _matrices(activation: str) -> int:
    """As large as width · hidden width, of a feed-forward network."""
    return 3 if activation.startswith("swiglu") else 2


def _sparse_weights(moe: MoEConfig) -> float:
    """Matrix weights of a MoE layer that a token meets: its experts', the shared ones', the gate's and the router's."""
    hidden = experts_met(moe) * moe.expert_width
    if moe.shared_experts:
        hidden += moe.shared_width or moe.shared_experts * moe.expert_width
    router = {"hash": 0, "noisy_topk": 2}.get(moe.router, 1) * moe.num_experts
    return moe.width * (_matrices(moe.activation) * hidden + moe.shared_gate + router)
