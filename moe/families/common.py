"""What most families share: Llama's names for attention and dense blocks, rotary settings, experts in lists."""

from collections.abc import Iterator
from typing import Any

from ... import ConfigError
from ..config import ModelConfig, RopeConfig
from ..layers.ffn import hidden_rows
from .keys import Keys
from .place import Place, expert, rows, transposed

LAYER = "model.layers"


def read_sizes(
    keys: Keys, *, head_dim: int | None = None, norm_eps: float = 1e-6, theta: float = 10000.0
) -> dict[str, Any]:
    """ModelConfig's arguments that all families spell alike; the others are their defaults where a key is missing."""
    heads, width = keys.get("num_attention_heads"), keys.get("hidden_size")
    keys.only("hidden_act", ("silu",), "silu")
    eos = keys.maybe("eos_token_id")
    return {
        "vocab_size": keys.get("vocab_size"),
        "width": width,
        "layers": keys.get("num_hidden_layers"),
        "heads": heads,
        "kv_heads": keys.get("num_key_value_heads", heads),
        "head_dim": keys.get("head_dim", head_dim or width // heads),
        "ffn_width": keys.get("intermediate_size"),
        "max_seq_len": keys.get("max_position_embeddings"),
        "norm_eps": keys.get("rms_norm_eps", norm_eps),
        "tie_embeddings": keys.get("tie_word_embeddings", False),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        **read_rope(keys, theta),
    }


def write_sizes(cfg: ModelConfig) -> dict[str, Any]:
    """The keys that `read_sizes` reads."""
    eos = cfg.eos_token_id
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.ffn_width,
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": cfg.tie_embeddings,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        **write_rope(cfg),
    }


def read_rope(keys: Keys, theta: float = 10000.0) -> dict[str, Any]:
    """`rope_theta` and `rope`, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    old = keys.maybe("rope_scaling") or {}
    given = {"rope_theta": keys.maybe("rope_theta"), **old, **(keys.maybe("rope_parameters") or {})}
    kind, length = given.get("rope_type", given.get("type", "default")), keys.get("max_position_embeddings")
    base = {"rope_theta": float(given.get("rope_theta") or theta)}
    turning = given.get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    if turning != 1:
        raise ConfigError(f"partial_rotary_factor ({turning}) of config.json must be 1: others are not computed here")
    if kind == "default":
        return base
    original = given.get("original_max_position_embeddings")
    if kind == "dynamic":  # it changes nothing up to the length that the model may be used with
        return base
    if kind not in ("linear", "yarn", "llama3"):
        known = "default, linear, dynamic, yarn or llama3"
        raise ConfigError(f"rope_type ({kind}) of config.json must be {known}: others are not computed here")
    stretch: dict[str, Any] = {"kind": kind, "factor": float(given["factor"]), "original_len": original or length}
    if kind == "llama3":
        stretch |= {name: float(given[name]) for name in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        stretch |= {name: float(given[name]) for name in ("beta_fast", "beta_slow") if given.get(name)}
        stretch |= {"truncate": bool(given.get("truncate", True)), "magnitude": given.get("attention_factor")}
    return base | {"rope": RopeConfig(**stretch)}


def write_rope(cfg: ModelConfig) -> dict[str, Any]:
    """`rope_parameters`.

    Raises:
        ConfigError: a stretch that Hugging Face has no name for.
    """
    given: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    rope = cfg.rope
    if rope is None:
        return {"rope_parameters": given}
    if rope.kind == "ntk":
        raise ConfigError("model.rope.kind (ntk) must be one that Hugging Face knows: use yarn, linear or llama3")
    given |= {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind != "linear":
        given["original_max_position_embeddings"] = rope.original_len
    if rope.kind == "llama3":
        given |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        given |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        given |= {} if rope.magnitude is None else {"attention_factor": rope.magnitude}
    return {"rope_parameters": given}


def ends(cfg: ModelConfig) -> Iterator[Place]:
    """Embedding, last norm and head."""
    yield Place("model.embed_tokens.weight", "embed.weight")
    yield Place("model.norm.weight", "norm.weight")
    if not cfg.tie_embeddings:
        yield Place("lm_head.weight", "head.weight")


def norms(layer: int) -> Iterator[Place]:
    """A block's two norms."""
    yield Place(f"{LAYER}.{layer}.input_layernorm.weight", f"blocks.{layer}.attention_norm.weight")
    yield Place(f"{LAYER}.{layer}.post_attention_layernorm.weight", f"blocks.{layer}.ffn_norm.weight")


def attention(cfg: ModelConfig, layer: int) -> Iterator[Place]:
    """q, k, v, o with what `cfg.attention` gives them: biases, norms."""
    own, theirs, ours = cfg.attention, f"{LAYER}.{layer}.self_attn", f"blocks.{layer}.attention"
    for letter in "qkvo":
        yield Place(f"{theirs}.{letter}_proj.weight", f"{ours}.w{letter}.weight")
        if own.output_bias if letter == "o" else own.qkv_bias:
            yield Place(f"{theirs}.{letter}_proj.bias", f"{ours}.w{letter}.bias")
    for letter in "qk" if own.qk_norm != "none" else "":
        yield Place(f"{theirs}.{letter}_norm.weight", f"{ours}.{letter}_norm.weight")


def gated(theirs: str, ours: str, hidden: int) -> Iterator[Place]:
    """A dense SwiGLU network."""
    yield Place(f"{theirs}.gate_proj.weight", f"{ours}.w_in.weight", rows(0, hidden))
    yield Place(f"{theirs}.up_proj.weight", f"{ours}.w_in.weight", rows(hidden, hidden))
    yield Place(f"{theirs}.down_proj.weight", f"{ours}.w_out.weight")


def experts(
    theirs: str, ours: str, cfg: ModelConfig, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Place]:
    """SwiGLU experts in a list, `theirs.{e}.gate_proj.weight` and so on; `ours` is the layer's name."""
    assert cfg.moe is not None
    hidden = cfg.moe.expert_width
    assert hidden_rows(cfg.moe.activation, hidden) == 2 * hidden
    gate, up, down = names
    for e in range(cfg.moe.num_experts):
        yield Place(f"{theirs}.{e}.{gate}.weight", f"{ours}.experts.w_in", expert(e, rows(0, hidden)))
        yield Place(f"{theirs}.{e}.{up}.weight", f"{ours}.experts.w_in", expert(e, rows(hidden, hidden)))
        yield Place(f"{theirs}.{e}.{down}.weight", f"{ours}.experts.w_out", expert(e, transposed))
