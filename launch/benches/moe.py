"""`turnout bench moe`: the mixture of experts behind a router, in our forms and in those of libraries that are here.

T tokens, K choices, E experts, D width, F hidden width, H = 2F.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import ConfigError, kernels
from ...configs.typed import check
from ...kernels import registry
from .ceilings import device, pages
from .maker import Maker
from .timing import Run, alternate

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
ROUTINGS = ("uniform", "zipf", "one")
DRAWS = 16  # routings that calls go round in
SHARE = 0.2  # of the free memory that one copy of the experts may take
DTYPE = torch.bfloat16
Mlp = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x_TD, ids_TK and weights_TK → y_TD."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer: E experts, of which each token takes `top_k`."""

    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def bytes_per_expert(self) -> int:
        return 2 * 3 * self.width * self.hidden


# All with SwiGLU, which the operation has; GPT-OSS clamps it, Switch has ReLU and no gate.
SHAPES: Mapping[str, Shape] = {
    "qwen3-30b-a3b": Shape(width=2048, hidden=768, experts=128, top_k=8),
    "qwen3moe-mini": Shape(width=1024, hidden=512, experts=32, top_k=4),
    "mixtral": Shape(width=4096, hidden=14336, experts=8, top_k=2),
    "olmoe": Shape(width=2048, hidden=1024, experts=64, top_k=8),
    "gpt-oss": Shape(width=2880, hidden=2880, experts=32, top_k=4),
    "switch-base-128": Shape(width=768, hidden=3072, experts=128, top_k=1),
}


def resident(name: str, experts: int | None, free: int) -> Shape:
    """The shape with as many experts as are asked for, or as `free` bytes allow several copies of.

    Raises:
        ConfigError: there is no such shape, or there are fewer experts than a token takes.
    """
    check(name in SHAPES, "shape", name, "is no shape", f"use {', '.join(SHAPES)}")
    shape = SHAPES[name]
    fitting = int(free * SHARE) // shape.bytes_per_expert
    found = replace(shape, experts=min(shape.experts, experts or fitting))
    if found.experts < shape.top_k:
        needed = shape.top_k * shape.bytes_per_expert / SHARE / 1e9
        rule = f"leaves {found.experts} of the {shape.top_k} experts of a token"
        raise ConfigError(f"shape ({name}) with {free / 1e9:.1f} GB free {rule}: {needed:.1f} GB are needed")
    return found


@torch.inference_mode()
def measure(
    shape: Shape, *, tokens: Sequence[int], routing: str, rounds: int, huge: bool, forms: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row for every number of tokens and every form, ours and others', in turns; what is not here has a row too."""
    maker = Maker(device(), huge=huge)
    w_in, w_out = (
        maker.weight(shape.experts, *own) for own in ((2 * shape.hidden, shape.width), (shape.hidden, shape.width))
    )
    peers = {name: make(w_in, w_out, huge) for name, make in PEERS.items() if not forms or name in forms}
    rows: list[dict[str, Any]] = []
    for T in tokens:
        x = maker.rows(T, shape.width)
        draws = [_draw(maker, T, shape, routing) for _ in range(DRAWS if T <= 64 else 1)]
        runs = {name: _call(mlp, x, draws) for name, mlp in _ours(x, draws[0], w_in, w_out, forms).items()}
        runs |= {name: _call(peer, x, draws) for name, peer in peers.items() if peer is not None}
        met = sum(len(ids.unique()) for ids, _ in draws) / len(draws)
        size = met * shape.bytes_per_expert + 4 * T * shape.width
        flops = 6 * T * shape.top_k * shape.width * shape.hidden
        unasked = registry.choose("moe_mlp", x, *draws[0], None, w_in, w_out)
        for form, seconds in alternate(runs, rounds, maker.device.type == "cuda").items():
            own = {"tokens": T, "experts met": met, "form": form, "unasked": form == unasked}
            rows.append({**own, "seconds": seconds, "size": size, "flops": flops})
    absent = [name for name, peer in peers.items() if peer is None]
    return rows + [{"form": name, "note": "not installed"} for name in absent]


def _ours(x: Tensor, draw: tuple[Tensor, Tensor], w_in: Tensor, w_out: Tensor, asked: Sequence[str]) -> dict[str, Mlp]:
    """The operation in its forms that fit, and the same made of smaller operations' library forms."""

    def form_of(form: str) -> Mlp:
        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            with registry.using(form):
                return kernels.moe_mlp(x, ids, weights, None, w_in, w_out)

        return run

    found: dict[str, Mlp] = {}
    for form in ("reference", "torch", "cpp", "triton"):
        with registry.using(form):
            if registry.choose("moe_mlp", x, *draw, None, w_in, w_out) == form:
                found[form] = form_of(form)
    found["composed"] = lambda x, ids, weights: composed(x, ids, weights, w_in, w_out)
    return {form: run for form, run in found.items() if not asked or form in asked}


def composed(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> Tensor:
    """Sort, permute, two grouped products of the library and SwiGLU, combine."""
    with registry.using("torch"):
        kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        order_N, slot_TK, counts_E = kernels.sort_by_expert(ids_TK, kept_TK, len(w_in_EHD))
        ends_E = counts_E.cumsum(0).int()
        rows_ND = kernels.permute(x_TD, order_N, slot_TK)
        h_NF = kernels.swiglu(kernels.grouped_gemm(rows_ND, w_in_EHD.mT, ends_E))
        return kernels.combine(kernels.grouped_gemm(h_NF, w_out_EFD, ends_E), weights_TK, order_N, slot_TK)


def zentorch(w_in: Tensor, w_out: Tensor, huge: bool) -> Mlp | None:
    """AMD's fused layer, on weights of its own: it packs them where they lie, and so destroys them."""
    if importlib.util.find_spec("zentorch") is None or w_in.device.type != "cpu":
        return None
    importlib.import_module("zentorch")
    own_in, own_out = pages(tuple(w_in.shape), DTYPE, huge=huge).copy_(w_in), _turned(w_out, huge)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(
            y, x, own_in, own_out, None, None, weights, ids.int(), False, "silu"
        )  # fmt: skip
        return y

    return run


def transformers(kind: str, w_in: Tensor, w_out: Tensor, huge: bool) -> Mlp | None:
    """Qwen3-MoE's experts: eager (a loop) or grouped_mm."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, D = len(w_in), w_in.shape[2]
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=w_out.shape[1], num_experts=E, experts_implementation=kind
    )
    with torch.device("meta"):
        layer = Qwen3MoeExperts(config)
    layer.gate_up_proj = nn.Parameter(w_in, requires_grad=False)
    layer.down_proj = nn.Parameter(_turned(w_out, huge), requires_grad=False)
    return layer.eval()


PEERS: Mapping[str, Callable[[Tensor, Tensor, bool], Mlp | None]] = {
    "zentorch": zentorch,
    "transformers eager": lambda w_in, w_out, huge: transformers("eager", w_in, w_out, huge),
    "transformers grouped_mm": lambda w_in, w_out, huge: transformers("grouped_mm", w_in, w_out, huge),
}


def _turned(w_EFD: Tensor, huge: bool) -> Tensor:
    """The same as [E, D, F], which libraries expect."""
    E, F, D = w_EFD.shape
    held = pages((E, D, F), w_EFD.dtype, huge=huge) if w_EFD.device.type == "cpu" else w_EFD.new_empty(E, D, F)
    return held.copy_(w_EFD.mT)


def _draw(maker: Maker, T: int, shape: Shape, routing: str) -> tuple[Tensor, Tensor]:
    """ids_TK and weights_TK. `zipf`: expert e is taken in proportion to 1 / (e + 1); `one`: all take the same."""
    ids, weights = maker.routing(T, shape.experts, shape.top_k)
    if routing == "one":
        ids = ids[:1].expand(T, -1).contiguous()
    if routing == "zipf":
        popular = 1 / torch.arange(1, shape.experts + 1, device=ids.device)
        ids = torch.multinomial(popular.expand(T, -1), shape.top_k)
    return ids, weights


def _call(mlp: Mlp, x: Tensor, draws: Sequence[tuple[Tensor, Tensor]]) -> Run:
    return lambda i: mlp(x, *draws[i % len(draws)])
