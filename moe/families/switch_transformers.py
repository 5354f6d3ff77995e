"""Switch Transformers (Fedus et al. 2101.03961; google/switch-base-8 and its kin): T5 with sparse blocks.

Their capacity is a number of tokens, the same for every sequence, in training and in evaluation. Ours is the larger of
a share of the sequence and `moe.min_capacity`, so with a share of next to nothing the two drop the same tokens.
"""

from collections.abc import Iterator
from typing import Any

from ... import ConfigError
from ..config import AttentionConfig, EncoderConfig, ModelConfig, MoEConfig
from .family import Family
from .keys import Keys
from .place import Place, expert, transposed

NO_SHARE = 1e-9  # of a sequence: capacity is `expert_capacity` alone
SILENT = (  # they decide nothing that a trained model computes, or follow from the other keys
    "dropout_rate", "initializer_factor", "router_ignore_padding_tokens", "add_router_probs", "add_cross_attention",
    "is_encoder_decoder", "encoder_sparse_step", "decoder_sparse_step",
)  # fmt: skip


def read(keys: Keys) -> ModelConfig:
    for name in SILENT:
        keys.maybe(name)
    keys.only("tie_word_embeddings", (True,), True)  # untied, their encoder and decoder embed apart
    keys.only("router_dtype", ("float32",), "float32")
    keys.only("feed_forward_proj", ("relu", "gelu"), "relu")
    for name in ("router_bias", "is_gated_act"):
        keys.only(name, (False,), False)
    width, layers, heads = keys.get("d_model"), keys.get("num_layers"), keys.get("num_heads")
    decoders = keys.get("num_decoder_layers", layers)
    activation = keys.only("dense_act_fn", ("relu", "gelu"), "relu")
    sparse = sparse_blocks(decoders, keys.get("num_sparse_decoder_layers", 3))
    encoder_sparse = sparse_blocks(layers, keys.get("num_sparse_encoder_layers", 3))
    hidden, eos = keys.get("d_ff"), keys.get("eos_token_id", 1)
    moe = MoEConfig(
        width=width, expert_width=hidden, num_experts=keys.get("num_experts", 8), activation=activation,
        capacity_factor=NO_SHARE, eval_capacity_factor=NO_SHARE, min_capacity=keys.get("expert_capacity", 64),
        jitter=keys.get("router_jitter_noise", 0.01), balance_loss=keys.get("router_aux_loss_coef", 0.001),
        z_loss=keys.get("router_z_loss_coef", 0.001), sparse_layers=sparse,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=keys.get("vocab_size"), width=width, layers=decoders, heads=heads, kv_heads=heads,
        head_dim=keys.get("d_kv"), ffn_width=hidden, max_seq_len=keys.get("n_positions", 512), activation=activation,
        norm_eps=keys.get("layer_norm_epsilon", 1e-6), tie_embeddings=True, logit_scale=width**-0.5,
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        attention=AttentionConfig(
            positions="relative", buckets=keys.get("relative_attention_num_buckets", 32),
            max_distance=keys.get("relative_attention_max_distance", 128),
        ),
        encoder=EncoderConfig(
            layers=layers, sparse_layers=encoder_sparse,
            start_token_id=keys.get("decoder_start_token_id", keys.maybe("pad_token_id") or 0),
        ),
        moe=moe,
    )  # fmt: skip


def write(cfg: ModelConfig) -> dict[str, Any]:
    moe, encoder, own = cfg.moe, cfg.encoder, cfg.attention
    fits = moe is not None and encoder is not None and cfg.tie_embeddings and cfg.logit_scale == cfg.width**-0.5
    fits = fits and own == AttentionConfig(positions="relative", buckets=own.buckets, max_distance=own.max_distance)
    if not fits or moe is None or encoder is None or cfg.kv_heads != cfg.heads:
        rule = "must be a sparse encoder-decoder with T5's attention, model.logit_scale of 1 / sqrt(model.width)"
        raise ConfigError(f"family (switch_transformers) {rule} and tied embeddings: choose another family")
    plain = moe.router == "switch" and not (moe.bias or moe.shared_experts) and moe.expert_width == cfg.ffn_width
    if not plain or moe.activation != cfg.activation or cfg.activation not in ("relu", "gelu"):
        rule = "must route by moe.router=switch to experts like its dense slots, with relu or gelu"
        raise ConfigError(f"family (switch_transformers) {rule}: choose another family")
    eos, sparse = cfg.eos_token_id, [layer for layer in cfg.moe_layers if layer < cfg.layers]
    return {
        "vocab_size": cfg.vocab_size, "d_model": cfg.width, "d_kv": cfg.head_dim, "d_ff": cfg.ffn_width,
        "num_heads": cfg.heads, "num_layers": encoder.layers, "num_decoder_layers": cfg.layers,
        "num_sparse_encoder_layers": _number(
            encoder.layers, [layer - cfg.layers for layer in cfg.moe_layers if layer >= cfg.layers]
        ),
        "num_sparse_decoder_layers": _number(cfg.layers, sparse), "num_experts": moe.num_experts,
        "expert_capacity": _capacity(cfg.max_seq_len, moe), "router_bias": False, "router_dtype": "float32",
        "router_jitter_noise": moe.jitter, "router_aux_loss_coef": moe.balance_loss, "router_z_loss_coef": moe.z_loss,
        "relative_attention_num_buckets": own.buckets, "relative_attention_max_distance": own.max_distance,
        "layer_norm_epsilon": cfg.norm_eps, "dense_act_fn": cfg.activation, "is_encoder_decoder": True,
        "tie_word_embeddings": True, "n_positions": cfg.max_seq_len, "decoder_start_token_id": encoder.start_token_id,
        "pad_token_id": encoder.start_token_id, "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
    }  # fmt: skip


def sparse_blocks(layers: int, asked: int) -> tuple[int, ...]:
    """The sparse blocks of a stack by their rule: of every `layers // asked` the second; asking for none leaves one."""
    step = layers // asked if asked > 0 else layers
    return tuple(i for i in range(layers) if step == 1 or (step > 0 and i % step == 1))


def places(cfg: ModelConfig) -> Iterator[Place]:
    assert cfg.encoder is not None
    yield Place("shared.weight", "embed.weight")
    yield Place("decoder.final_layer_norm.weight", "norm.weight")
    yield Place("encoder.final_layer_norm.weight", "encoder.norm.weight")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Place(f"decoder.{bias}", "relative.weight")
    yield Place(f"encoder.{bias}", "encoder.relative.weight")
    for layer in range(cfg.layers):
        theirs, ours = f"decoder.block.{layer}.layer", f"blocks.{layer}"
        yield from _attention(f"{theirs}.0", "SelfAttention", f"{ours}.attention")
        yield from _attention(f"{theirs}.1", "EncDecAttention", f"{ours}.cross")
        yield from _feed_forward(f"{theirs}.2", ours, cfg, layer)
    for layer in range(cfg.encoder.layers):
        theirs, ours = f"encoder.block.{layer}.layer", f"encoder.blocks.{layer}"
        yield from _attention(f"{theirs}.0", "SelfAttention", f"{ours}.attention")
        yield from _feed_forward(f"{theirs}.1", ours, cfg, cfg.layers + layer)


def _attention(theirs: str, kind: str, ours: str) -> Iterator[Place]:
    yield Place(f"{theirs}.layer_norm.weight", f"{ours}_norm.weight")
    for letter in "qkvo":
        yield Place(f"{theirs}.{kind}.{letter}.weight", f"{ours}.w{letter}.weight")


def _feed_forward(theirs: str, ours: str, cfg: ModelConfig, layer: int) -> Iterator[Place]:
    yield Place(f"{theirs}.layer_norm.weight", f"{ours}.ffn_norm.weight")
    if cfg.moe is None or layer not in cfg.moe_layers:
        yield Place(f"{theirs}.mlp.wi.weight", f"{ours}.ffn.w_in.weight")
        yield Place(f"{theirs}.mlp.wo.weight", f"{ours}.ffn.w_out.weight")
        return
    yield Place(f"{theirs}.mlp.router.classifier.weight", f"{ours}.ffn.router.weight")
    for e in range(cfg.moe.num_experts):
        yield Place(f"{theirs}.mlp.experts.expert_{e}.wi.weight", f"{ours}.ffn.experts.w_in", expert(e))
        yield Place(f"{theirs}.mlp.experts.expert_{e}.wo.weight", f"{ours}.ffn.experts.w_out", expert(e, transposed))


def _number(layers: int, sparse: list[int]) -> int:
    """How many sparse blocks to ask for in order to get these.

    Raises:
        ConfigError: no number gives them.
    """
    found = next((n for n in (len(sparse), *range(layers + 2)) if list(sparse_blocks(layers, n)) == sparse), None)
    if found is None:
        rule = f"must be the second of every so many for family switch_transformers, of {layers}"
        raise ConfigError(f"moe.sparse_layers ({sparse}) {rule}: choose another family")
    return found


def _capacity(longest: int, moe: MoEConfig) -> int:
    """Tokens of a sequence that an expert takes; without capacity all of them.

    Raises:
        ConfigError: the capacity grows with the sequence.
    """
    factor = moe.eval_capacity_factor
    if factor is None:
        return longest
    tokens = moe.capacity_tokens or longest
    least = max(-(-tokens * factor // moe.num_experts), moe.min_capacity)
    if moe.capacity_tokens is None and least > moe.min_capacity:
        rule = "must not grow with the sequence for family switch_transformers, whose capacity is a number"
        raise ConfigError(f"moe.eval_capacity_factor ({factor}) {rule}: use null, or set moe.capacity_tokens")
    return int(least)


SWITCH_TRANSFORMERS = Family(
    name="switch_transformers", architecture="SwitchTransformersForConditionalGeneration",
    read=read, write=write, places=places,
    ignored=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
)  # fmt: skip
