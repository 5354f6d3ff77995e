"""How a model attends: kinds of keys and values, positions, and what single families add. No torch here."""

from dataclasses import dataclass
from typing import Literal

from ..configs.typed import check, check_choices


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions stretched beyond the lengths that a model was first trained on (`moe/layers/rotary.py`).

    Args:
        kind: `linear` (Chen 2306.15595), `ntk` (a larger base), `yarn` (Peng 2309.00071), `llama3` (Llama 3.1).
        factor: how much longer.
        original_len: tokens of a sequence before.
        low_freq_factor: llama3: wavelengths above original_len / low_freq_factor are stretched whole.
        high_freq_factor: llama3: those below original_len / high_freq_factor stay.
        beta_fast: yarn: dimensions that turn more often within original_len stay.
        beta_slow: yarn: those that turn less often are stretched whole.
        truncate: yarn: round the borders between them to whole dimensions (GPT-OSS does not).
        magnitude: yarn: factor on queries and keys alike; null = 0.1 · ln(factor) + 1.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"] = "linear"
    factor: float = 1.0
    original_len: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, "model.rope")
        check(self.factor >= 1, "model.rope.factor", self.factor, "must be at least 1", "use 1 to change nothing")
        length = self.original_len
        check(length >= 1, "model.rope.original_len", length, "must be at least 1", "use the length trained on")
        low, high = self.low_freq_factor, self.high_freq_factor
        rule = f"must exceed model.rope.low_freq_factor ({low}), which must be positive"
        check(0 < low < high, "model.rope.high_freq_factor", high, rule, "use 1 and 4 (Llama 3.1)")
        slow, fast = self.beta_slow, self.beta_fast
        rule = f"must exceed model.rope.beta_slow ({slow}), which must be positive"
        check(0 < slow < fast, "model.rope.beta_fast", fast, rule, "use 32 and 1 (YaRN)")
        size = self.magnitude
        check(size is None or size > 0, "model.rope.magnitude", size, "must be positive", "use null")


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2 2405.04434 §2.1): the cache holds `rank + rope_dim` numbers a token.

    `model.head_dim` is then d_h, the part of a head's queries and keys without positions.

    Args:
        rank: d_c, of the keys' and values' common latent.
        rope_dim: d_h^R, of the rotary key that all heads share, and of each head's rotary query.
        value_dim: of one head's values.
        query_rank: d_c', of the queries' latent; null = queries straight from the hidden state.
        eps: of the latents' norms.
    """

    rank: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("rank", "rope_dim", "value_dim"):
            value = getattr(self, name)
            check(value >= 1, f"model.attention.latent.{name}", value, "must be at least 1", "use DeepSeek's ratios")
        rank, even = self.query_rank, self.rope_dim % 2 == 0
        check(rank is None or rank >= 1, "model.attention.latent.query_rank", rank, "must be at least 1", "use null")
        rule = "must be even (rotary pairs)"
        check(even, "model.attention.latent.rope_dim", self.rope_dim, rule, "use an even size")
        check(self.eps > 0, "model.attention.latent.eps", self.eps, "must be positive", "use 1e-6")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What an attention layer has beside its heads; the defaults are Llama's.

    Args:
        latent: multi-head latent attention instead of keys and values by head.
        positions: `rotary`, or `relative` (T5 1910.10683 §2.1: a learned bias a head by distance, shared by the
            layers of a stack).
        buckets: relative: distances are told apart in so many buckets.
        max_distance: relative: all distances from here on share a bucket.
        qkv_bias: biases on queries, keys and values (Qwen2, GPT-OSS); under `latent` on what makes the latents.
        output_bias: a bias on the output projection.
        qk_norm: RMSNorm on queries and keys before rotation: over each `head` (Qwen3), the whole `width` (OLMoE).
        clip: queries, keys and values are clamped to ± this, after `qk_norm` and before rotation (OLMoE's clip_qkv).
        window: a query sees its own position and the window - 1 before it.
        window_layers: ids of the layers whose attention is so limited; null = all.
        sinks: a learned score a head that takes part in the softmax and has no value (GPT-OSS).
        scale: factor on q · k; null = 1 / sqrt(size of a query), 1 for `relative`.
    """

    latent: LatentConfig | None = None
    positions: Literal["rotary", "relative"] = "rotary"
    buckets: int = 32
    max_distance: int = 128
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    clip: float | None = None
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    sinks: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, "model.attention")
        for name in ("clip", "window", "scale"):
            value = getattr(self, name)
            check(value is None or value > 0, f"model.attention.{name}", value, "must be positive", "use null for none")
        rule = "needs model.attention.window"
        alone = self.window_layers is None or self.window is not None
        check(alone, "model.attention.window_layers", self.window_layers, rule, "set both, or neither")
        buckets, rule = self.buckets, "must be a multiple of 4, and half of it below model.attention.max_distance"
        fits = buckets >= 4 and buckets % 4 == 0 and buckets // 2 < self.max_distance
        check(fits, "model.attention.buckets", buckets, rule, "use 32, with max_distance 128 (T5)")
        if self.latent is not None:
            for name, plain in (("positions", "rotary"), ("qk_norm", "none"), ("clip", None), ("sinks", False)):
                value = getattr(self, name)
                rule = "has no place in latent attention"
                check(value == plain, f"model.attention.{name}", value, rule, f"use {plain}")

    def window_of(self, layer: int) -> int | None:
        """The window of one layer; None = it sees everything before it."""
        return self.window if self.window_layers is None or layer in self.window_layers else None


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder of an encoder-decoder (T5 1910.10683; Switch 2101.03961): blocks that see both ways.

    Args:
        layers: how many blocks.
        sparse_layers: ids, within the encoder, of its mixture-of-experts blocks; null = as `moe.every` says.
        start_token_id: the token that every decoder sequence begins with.
    """

    layers: int
    sparse_layers: tuple[int, ...] | None = None
    start_token_id: int = 0

    def __post_init__(self) -> None:
        check(self.layers >= 1, "model.encoder.layers", self.layers, "must be at least 1", "use model.encoder=null")
        for layer in self.sparse_layers or ():
            rule = f"must lie below model.encoder.layers ({self.layers})"
            check(0 <= layer < self.layers, "model.encoder.sparse_layers", layer, rule, "leave it out")
