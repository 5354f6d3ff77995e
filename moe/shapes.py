"""The parameters of a decoder by name and shape, as `Decoder(cfg).named_parameters()` has them, without building any.

No torch here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Literal

from .config import LatentConfig, ModelConfig, MoEConfig

Shapes = dict[str, tuple[int, ...]]
# What tensor parallelism divides of a block: keys' and values' matrices stay whole where ranks share a head of them.
KEYS = ("attention.wk.weight", "attention.wv.weight", "attention.wk.bias", "attention.wv.bias")
ROWS = ("attention.wo.weight", "ffn.w_out.weight")
COLUMNS = ("attention.wq.weight", "attention.wq.bias", "attention.wkv.weight", "attention.sinks", "ffn.w_in.weight")
DIVIDED = (*COLUMNS, *KEYS, *ROWS)


def shapes(cfg: ModelConfig) -> Shapes:
    """Name → shape of every parameter of the whole model."""
    found: Shapes = {"embed.weight": (cfg.vocab_size, cfg.width)}
    table = (cfg.attention.buckets, cfg.heads)
    if cfg.attention.positions == "relative":
        found["relative.weight"] = table
    for layer in range(cfg.layers):
        found.update((f"blocks.{layer}.{name}", shape) for name, shape in _block(cfg, layer))
    found["norm.weight"] = (cfg.width,)
    if not cfg.tie_embeddings:
        found["head.weight"] = (cfg.vocab_size, cfg.width)
    if cfg.encoder is not None:
        if cfg.attention.positions == "relative":
            found["encoder.relative.weight"] = table
        for layer in range(cfg.encoder.layers):
            own = _block(cfg, cfg.layers + layer)
            found.update((f"encoder.blocks.{layer}.{name}", shape) for name, shape in own)
        found["encoder.norm.weight"] = (cfg.width,)
    return found


@dataclass(frozen=True)
class Part:
    """A parameter as one rank holds it, alike in `times` layers (which `*` stands for in its name).

    Attributes:
        along: the dimension of the mesh along which ranks hold the same (`parallel/mesh.py`).
    """

    name: str
    shape: tuple[int, ...]
    along: Literal["stage", "replicas", "edp"]
    times: int = 1

    @property
    def count(self) -> int:
        """Numbers in all of them."""
        return self.times * prod(self.shape)


@cache
def held(cfg: ModelConfig, layers: tuple[int, ...], ep: int = 1, tp: int = 1) -> list[Part]:
    """What a rank holds that computes `layers`: the embedding with the first of all, norm and head with the last."""
    embed, dense, sparse, end = _parts(cfg, ep, tp)
    many = len(set(layers).intersection(cfg.moe_layers))
    first, last = 0 in layers, cfg.layers - 1 in layers
    found = [*embed] if first or (last and cfg.tie_embeddings) else []
    for kind, times in ((dense, len(layers) - many), (sparse, many)):
        found += [replace(part, times=times) for part in kind if times]
    return [*found, *end] if last else found


def block(cfg: ModelConfig, sparse: bool, ep: int = 1, tp: int = 1) -> list[Part]:
    """What a rank holds of one such block; empty when the model has none."""
    return _parts(cfg, ep, tp)[1 + sparse]


@cache
def _parts(cfg: ModelConfig, ep: int, tp: int) -> tuple[list[Part], list[Part], list[Part], list[Part]]:
    """Embedding, a dense block, a sparse block, and what ends the model."""
    blocks = []
    for sparse in (False, True):
        layer = next((i for i in range(cfg.layers) if (i in cfg.moe_layers) == sparse), None)
        named = () if layer is None else _block(cfg, layer)
        blocks.append([_part(cfg, f"blocks.*.{name}", shape, ep, tp) for name, shape in named])
    ends = [_part(cfg, name, shape, ep, tp) for name, shape in shapes(cfg).items() if not name.startswith("blocks.")]
    return ends[:1], blocks[0], blocks[1], ends[1:]


def _part(cfg: ModelConfig, name: str, shape: tuple[int, ...], ep: int, tp: int) -> Part:
    if is_expert(name):
        return Part(name, (shape[0] // ep, *shape[1:]), "edp" if ep > 1 else "stage")
    leaf = name.removeprefix("blocks.*.")
    if tp == 1 or leaf not in DIVIDED or (leaf in KEYS and cfg.kv_heads < tp):
        return Part(name, shape, "stage")
    local = (shape[0], shape[1] // tp) if leaf in ROWS else (shape[0] // tp, *shape[1:])
    return Part(name, local, "replicas")


def count(found: Shapes) -> int:
    """Numbers in all of them."""
    return sum(prod(shape) for shape in found.values())


@dataclass(frozen=True, kw_only=True)
class KVForm:
    """What one token leaves in the cache.

    Args:
        layers: that many times.
        heads: of keys and values; 1 for a latent, which all heads read.
        key_dim: numbers of a key.
        value_dim: numbers of a value.
        shared: the values are the first numbers of the keys (latent attention), and not kept again.
    """

    layers: int
    heads: int
    key_dim: int
    value_dim: int
    shared: bool = False

    @classmethod
    def of(cls, model: ModelConfig, tp: int = 1) -> "KVForm":
        """On each of `tp` ranks that divide the heads; several may read one head, which each of them then keeps."""
        latent = model.attention.latent
        if latent is None:
            heads = max(model.kv_heads // tp, 1)
            return cls(layers=model.layers, heads=heads, key_dim=model.head_dim, value_dim=model.head_dim)
        key = latent.rank + latent.rope_dim
        return cls(layers=model.layers, heads=1, key_dim=key, value_dim=latent.rank, shared=True)

    @property
    def numbers(self) -> int:
        """Of one token in all layers: 2 · layers · G · d, or layers · (c + r) (DeepSeek-V2 2405.04434 table 1)."""
        return self.layers * self.heads * (self.key_dim + (0 if self.shared else self.value_dim))


def is_expert(name: str) -> bool:
    """Whether the parameter is spread over the expert-parallel ranks."""
    return ".experts." in name


def is_router(name: str) -> bool:
    """Whether the parameter decides, in float32 whatever is around it."""
    return ".router." in name


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon moves the parameter: matrices and stacks of them, but for routers, embedding, head and tables."""
    table = name.startswith(("embed.", "head.")) or name.endswith(("relative.weight", ".b_in", ".b_out"))
    return dimensions >= 2 and not is_router(name) and not table


def _block(cfg: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    decodes = layer < cfg.layers
    yield "attention_norm.weight", (cfg.width,)
    yield from (("attention." + name, shape) for name, shape in _attention(cfg, cross=False))
    if decodes and cfg.encoder is not None:
        yield "cross_norm.weight", (cfg.width,)
        yield from (("cross." + name, shape) for name, shape in _attention(cfg, cross=True))
    yield "ffn_norm.weight", (cfg.width,)
    if cfg.moe is not None and layer in cfg.moe_layers:
        yield from _sparse(cfg.moe)
    else:
        yield "ffn.w_in.weight", (_rows(cfg.activation, cfg.ffn_width), cfg.width)
        yield "ffn.w_out.weight", (cfg.width, cfg.ffn_width)


def _attention(cfg: ModelConfig, cross: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    own, width, d = cfg.attention, cfg.width, cfg.head_dim
    if own.latent is not None:
        yield from _latent(cfg, own.latent)
        return
    query, key = cfg.heads * d, cfg.kv_heads * d
    if own.sinks and not cross:
        yield "sinks", (cfg.heads,)
    for name, rows in (("wq", query), ("wk", key), ("wv", key)):
        yield f"{name}.weight", (rows, width)
        if own.qkv_bias:
            yield f"{name}.bias", (rows,)
    yield "wo.weight", (width, query)
    if own.output_bias:
        yield "wo.bias", (width,)
    if own.qk_norm != "none":
        yield "q_norm.weight", (d if own.qk_norm == "head" else query,)
        yield "k_norm.weight", (d if own.qk_norm == "head" else key,)


def _latent(cfg: ModelConfig, latent: LatentConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    own, width, heads = cfg.attention, cfg.width, cfg.heads
    if latent.query_rank is not None:
        yield "wq_down.weight", (latent.query_rank, width)
        if own.qkv_bias:
            yield "wq_down.bias", (latent.query_rank,)
        yield "q_norm.weight", (latent.query_rank,)
    yield "wq.weight", (heads * (cfg.head_dim + latent.rope_dim), latent.query_rank or width)
    yield "wkv_down.weight", (latent.rank + latent.rope_dim, width)
    if own.qkv_bias:
        yield "wkv_down.bias", (latent.rank + latent.rope_dim,)
    yield "kv_norm.weight", (latent.rank,)
    yield "wkv.weight", (heads * (cfg.head_dim + latent.value_dim), latent.rank)
    yield "wo.weight", (width, heads * latent.value_dim)
    if own.output_bias:
        yield "wo.bias", (width,)


def _sparse(moe: MoEConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    experts, width, hidden = moe.num_experts, moe.width, moe.expert_width
    if moe.router != "hash":
        yield "ffn.router.weight", (experts, width)
    if moe.router == "noisy_topk":
        yield "ffn.router.noise_weight", (experts, width)
    if moe.router == "gpt_oss":
        yield "ffn.router.bias", (experts,)
    yield "ffn.experts.w_in", (experts, _rows(moe.activation, hidden), width)
    yield "ffn.experts.w_out", (experts, hidden, width)
    if moe.bias:
        yield "ffn.experts.b_in", (experts, _rows(moe.activation, hidden))
        yield "ffn.experts.b_out", (experts, width)
    if moe.shared_experts:
        shared = moe.shared_width or moe.shared_experts * hidden
        yield "ffn.shared.w_in.weight", (_rows(moe.activation, shared), width)
        yield "ffn.shared.w_out.weight", (width, shared)
    if moe.shared_gate:
        yield "ffn.shared_gate.weight", (1, width)


def _rows(activation: str, hidden: int) -> int:
    """As `layers.ffn.hidden_rows`, which loads torch."""
    return 2 * hidden if activation.startswith("swiglu") else hidden
