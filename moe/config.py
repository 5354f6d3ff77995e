"""What a model is: a frozen dataclass, validated at birth. No torch here."""

from dataclasses import dataclass, field
from math import gcd

from ..configs.typed import check, check_choices
from .attention_config import AttentionConfig, EncoderConfig, LatentConfig, RopeConfig
from .layer_config import BASE, COEFFICIENTS, PAPER, Activation, MoEConfig, RouterName, at_least, divisors
from .quantization_config import QuantizationConfig

__all__ = [
    "BASE", "COEFFICIENTS", "PAPER", "Activation", "AttentionConfig", "EncoderConfig", "LatentConfig", "MoEConfig",
    "ModelConfig", "QuantizationConfig", "RopeConfig", "RouterName", "check_heads",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer whose feed-forward slots are dense or, in its sparse blocks, mixtures of experts.

    Args:
        vocab_size: V.
        width: D, of the hidden states.
        layers: decoder blocks, with ids from 0; those of an encoder follow.
        heads: H, of queries.
        kv_heads: G, of keys and values: H (MHA), 1 (MQA) or between (GQA); H under latent attention.
        head_dim: d of one head; under latent attention its part without positions.
        ffn_width: hidden width of the dense feed-forward slots.
        max_seq_len: the longest sequence, in tokens.
        activation: of the dense slots; shared experts have `moe.activation`.
        rope_theta: base of the rotary frequencies.
        rope: how they are stretched; null = not at all.
        norm_eps: of the RMSNorms.
        tie_embeddings: the head is the embedding.
        logit_scale: factor on the hidden states before the head (T5 with tied embeddings: 1 / sqrt(D)).
        eos_token_id: what ends a text: one id or several.
        attention: what attention has beside its heads.
        encoder: null = decoder only.
        moe: null = dense.
        quantization: how matrices are stored of a model that `turnout compress` has rounded; null = as they are.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    max_seq_len: int
    activation: Activation = "swiglu"
    rope_theta: float = 10000.0
    rope: RopeConfig | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    logit_scale: float = 1.0
    eos_token_id: int | tuple[int, ...] | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    encoder: EncoderConfig | None = None
    moe: MoEConfig | None = None
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        check_choices(self, "model")
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn_width", "max_seq_len"):
            at_least("model", name, getattr(self, name), 1)
        rule, fix = f"must divide model.heads ({self.heads})", f"use {divisors(self.heads)}"
        check(self.heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads, rule, fix)
        rotates = self.attention.positions == "rotary" and self.attention.latent is None
        rule, fix = "must be even (rotary pairs)", "use an even size"
        check(self.head_dim % 2 == 0 or not rotates, "model.head_dim", self.head_dim, rule, fix)
        for name, fix in (("rope_theta", "use 10000"), ("norm_eps", "use 1e-5"), ("logit_scale", "use 1")):
            check(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive", fix)
        for eos in self.eos_token_ids:
            rule = f"must lie in the vocabulary (0 to {self.vocab_size - 1})"
            check(0 <= eos < self.vocab_size, "model.eos_token_id", eos, rule, "use the tokenizer's id")
        self._check_attention()
        if self.moe is not None:
            self._check_moe(self.moe)

    def _check_attention(self) -> None:
        attention = self.attention
        for layer in attention.window_layers or ():
            rule = f"must lie below model.layers ({self.layers})"
            check(0 <= layer < self.layers, "model.attention.window_layers", layer, rule, "leave it out")
        rule = f"must equal model.heads ({self.heads}) under latent attention, whose keys and values are one latent"
        fits = attention.latent is None or self.kv_heads == self.heads
        check(fits, "model.kv_heads", self.kv_heads, rule, f"use model.kv_heads={self.heads}")
        rule = "stretches rotary positions, and model.attention.positions=relative has none"
        fits = self.rope is None or attention.positions == "rotary"
        check(fits, "model.rope", self.rope and self.rope.kind, rule, "use model.rope=null")
        rule = "attends to what model.attention.latent can not cache apart"
        plain = self.encoder is None or attention.latent is None
        check(plain, "model.encoder", "set", rule, "use model.encoder=null, or no latent attention")
        start, rule = self.encoder.start_token_id if self.encoder else 0, f"must lie in 0 to {self.vocab_size - 1}"
        fits = 0 <= start < self.vocab_size
        check(fits, "model.encoder.start_token_id", start, rule, "use the id that the decoder was trained with")

    def _check_moe(self, moe: MoEConfig) -> None:
        rule = f"must equal model.width ({self.width})"
        check(moe.width == self.width, "moe.width", moe.width, rule, "leave it to follow model.width")
        for layer in moe.sparse_layers or ():
            rule = f"must lie below model.layers ({self.layers})"
            check(0 <= layer < self.layers, "moe.sparse_layers", layer, rule, "leave it out")
        rule = f"and moe.first_dense ({moe.first_dense}) leave no MoE block in model.layers ({self.layers})"
        check(bool(self.moe_layers), "moe.every", moe.every, rule, "lower them or add layers")
        rule = "lets a token's experts depend on later tokens, which a decoder has not seen yet"
        safe = moe.router != "expert_choice" or moe.noncausal
        check(safe, "moe.router", moe.router, rule, "use another router, or moe.noncausal=true to force it")

    def check_parts(self, tp: int) -> None:
        """Check that `tp` ranks can share out heads and hidden units.

        Raises:
            ConfigError: they do not divide evenly; the first that does not is named.
        """
        check_heads(self.heads, self.kv_heads, tp)
        own, fix = self.attention, "use parallel.tp=1"
        rule = f"normalises over all heads, and parallel.tp ({tp}) gives a rank some of them"
        check(tp == 1 or own.qk_norm != "width", "model.attention.qk_norm", own.qk_norm, rule, fix)
        rule = f"has biases that all layers share, and parallel.tp ({tp}) divides what layers own"
        check(tp == 1 or own.positions == "rotary", "model.attention.positions", own.positions, rule, fix)
        rule = f"attends to tokens that parallel.tp ({tp}) leaves on other ranks"
        check(tp == 1 or self.encoder is None, "model.encoder", "set", rule, fix)
        rule, fix = f"must be a multiple of parallel.tp ({tp})", f"use {max(self.ffn_width // tp, 1) * tp}"
        fits = self.ffn_width % tp == 0 or len(self.moe_layers) == self.layers
        check(fits, "model.ffn_width", self.ffn_width, rule, fix)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The ids of the sparse blocks, the encoder's after the decoder's.

        `moe.sparse_layers`, or from `moe.first_dense` on the last of every `moe.every` (GShard §2.2).
        """
        if self.moe is None:
            return ()
        decoder = self._sparse(self.moe, self.moe.sparse_layers, self.layers)
        if self.encoder is None:
            return decoder
        encoder = self._sparse(self.moe, self.encoder.sparse_layers, self.encoder.layers)
        return (*decoder, *(self.layers + layer for layer in encoder))

    @staticmethod
    def _sparse(moe: MoEConfig, listed: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
        if listed is not None:
            return tuple(sorted(set(listed)))
        return tuple(layer for layer in range(moe.first_dense, layers) if (layer + 1) % moe.every == 0)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


def check_heads(heads: int, kv_heads: int, tp: int) -> None:
    """Check that `tp` ranks can have equal parts of the heads, each with the K/V heads that it reads.

    Raises:
        ConfigError: they can not; model.heads or model.kv_heads is named.
    """
    rule = f"must be a multiple of parallel.tp ({tp})"
    check(heads % tp == 0, "model.heads", heads, rule, f"use parallel.tp={gcd(heads, tp)}, or other heads")
    fits, rule = kv_heads % tp == 0 or tp % kv_heads == 0, f"must divide parallel.tp ({tp}) or be a multiple of it"
    check(fits, "model.kv_heads", kv_heads, rule, f"use parallel.tp={gcd(kv_heads, tp)}, or other K/V heads")
