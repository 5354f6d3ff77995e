"""The parameters of a decoder by name and shape, as `Decoder(cfg).named_parameters()` has them, without building any.

No torch here.
"""

from collections.abc import Iterator
from math import prod

from .config import ModelConfig, MoEConfig

Shapes = dict[str, tuple[int, ...]]


def shapes(cfg: ModelConfig) -> Shapes:
    """Name → shape of every parameter of the whole model."""
    found: Shapes = {"embed.weight": (cfg.vocab_size, cfg.width)}
    for layer in range(cfg.layers):
        found.update((f"blocks.{layer}.{name}", shape) for name, shape in _block(cfg, layer))
    found["norm.weight"] = (cfg.width,)
    if not cfg.tie_embeddings:
        found["head.weight"] = (cfg.vocab_size, cfg.width)
    return found


def local(whole: Shapes, ep: int) -> Shapes:
    """What one rank holds: everything, and of the experts its share."""
    return {name: (shape[0] // ep, *shape[1:]) if is_expert(name) else shape for name, shape in whole.items()}


def count(found: Shapes) -> int:
    """Numbers in all of them."""
    return sum(prod(shape) for shape in found.values())


def is_expert(name: str) -> bool:
    """Whether the parameter is spread over the expert-parallel ranks."""
    return ".experts." in name


def is_router(name: str) -> bool:
    """Whether the parameter decides, in float32 whatever is around it."""
    return ".router." in name


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon moves the parameter: matrices and stacks of them, but for routers, embedding and head."""
    return dimensions >= 2 and not is_router(name) and not name.startswith(("embed.", "head."))


def _block(cfg: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    query, key = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    yield "attention_norm.weight", (cfg.width,)
    yield "attention.wq.weight", (query, cfg.width)
    yield "attention.wk.weight", (key, cfg.width)
    yield "attention.wv.weight", (key, cfg.width)
    yield "attention.wo.weight", (cfg.width, query)
    yield "ffn_norm.weight", (cfg.width,)
    if cfg.moe is not None and layer in cfg.moe_layers:
        yield from _sparse(cfg.moe)
    else:
        yield "ffn.w_in.weight", (2 * cfg.ffn_width, cfg.width)
        yield "ffn.w_out.weight", (cfg.width, cfg.ffn_width)


def _sparse(moe: MoEConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    experts, width, hidden = moe.num_experts, moe.width, moe.expert_width
    gates = 2 if moe.activation == "swiglu" else 1
    if moe.router != "hash":
        yield "ffn.router.weight", (experts, width)
    if moe.router == "noisy_topk":
        yield "ffn.router.noise_weight", (experts, width)
    if moe.router == "gpt_oss":
        yield "ffn.router.bias", (experts,)
    yield "ffn.experts.w_in", (experts, gates * hidden, width)
    yield "ffn.experts.w_out", (experts, hidden, width)
    if moe.shared_experts:
        shared = moe.shared_width or moe.shared_experts * hidden
        yield "ffn.shared.w_in.weight", (gates * shared, width)
        yield "ffn.shared.w_out.weight", (width, shared)
    if moe.shared_gate:
        yield "ffn.shared_gate.weight", (1, width)
