"""SmoothQuant: move what is large in rows into the matrices that they meet (Xiao et al. 2211.10438 eq. 4).

    s_j = max |x_j|^α / max |w_j|^(1 - α),    W · x = (W · diag(s)) · (diag(s)⁻¹ · x)

What made x takes the 1 / s: a norm, the up projection of a hidden unit, the values of attention. Every s is a power of
two, so that nothing is rounded by it: the block computes what it computed, bit for bit, and its router chooses alike.

D channels of the rows, E experts, F hidden width, H heads, G heads of values, d head size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers.attention import Attention
from ..layers.block import Block
from ..layers.ffn import ACTIVATIONS, FeedForward
from ..layers.latent import LatentAttention
from ..layers.moe import MoE
from ..layers.norm import RMSNorm
from .seen import Seen

LIMIT = 10
"""s lies in 2^±10: weights of half precision survive it."""


@dataclass(frozen=True)
class Fold:
    """One set of channels, and who must know of it.

    Attributes:
        name: of what makes the rows.
        makes: divided: a norm's weight or biases [D], or weights [..., any] whose rows are the channels.
        meets: multiplied, and what s is found by: weights [..., D].
        seen: what these meet.
        routes: multiplied too, but not rounded: routers and gates.
        channel_D: of each channel of the rows, which s it has, where several share one; None = each its own.
    """

    name: str
    makes: Sequence[Tensor]
    meets: Sequence[Tensor]
    seen: Sequence[Seen]
    routes: Sequence[Tensor] = field(default=())
    channel_D: Tensor | None = None


@torch.no_grad()
def smooth(block: Block, met: Mapping[str, list[Seen]], alpha: float) -> dict[str, Tensor]:
    """Move scales in `block`, in place; `met` becomes what its matrices meet from now on.

    Args:
        block: of whole weights.
        met: by name of a matrix, of a stack one an expert.
        alpha: 0 moves all into the rows, 1 all into the weights.

    Returns:
        s by the name of what makes the rows; what met nothing is left alone and not named.
    """
    done = {}
    for fold in folds(block, met):
        if any(seen.count for seen in fold.seen):
            done[fold.name] = _apply(fold, alpha)
    return done


def folds(block: Block, met: Mapping[str, list[Seen]]) -> Iterator[Fold]:
    """Where scales of `block` can move: before every matrix whose rows are linear in something of its own."""
    for name in ("attention", "cross"):
        module = getattr(block, name)
        if module is not None:
            yield from _of_attention(module, getattr(block, f"{name}_norm"), name, met)
    ffn, norm = block.ffn, block.ffn_norm.weight
    if isinstance(ffn, FeedForward):
        yield Fold("ffn_norm", (norm,), (ffn.w_in.weight,), met.get("ffn.w_in", ()))
        yield from _of_hidden(ffn, "ffn", met)
    elif isinstance(ffn, MoE):
        seen = [*met.get("ffn.experts.w_in", ())]
        meets: list[Tensor] = [ffn.experts.w_in]
        routes: list[Tensor] = [weight for weight in ffn.router.parameters() if weight.ndim == 2]
        if ffn.shared is not None:
            seen, meets = [*seen, *met.get("ffn.shared.w_in", ())], [*meets, ffn.shared.w_in.weight]
            yield from _of_hidden(ffn.shared, "ffn.shared", met)
        if ffn.shared_gate is not None:
            routes.append(ffn.shared_gate.weight)
        yield Fold("ffn_norm", (norm,), meets, seen, routes)
        yield from _of_experts(ffn, met)


def _of_attention(module: nn.Module, norm: RMSNorm, name: str, met: Mapping[str, list[Seen]]) -> Iterator[Fold]:
    """The rows of queries, keys and values (of cross-attention the queries alone), and those of the output."""
    if isinstance(module, Attention):
        spec = module.spec
        inputs = [module.wq] if spec.cross else [module.wq, module.wk, module.wv]
        shared = torch.arange(spec.kv_heads * spec.head_dim).view(spec.kv_heads, 1, -1)
        channel_D = shared.expand(-1, spec.heads // spec.kv_heads, -1).flatten()
        biases = () if module.wv.bias is None else (module.wv.bias,)
        if module.clip is None:  # values that are clamped are not linear
            makes = (module.wv.weight, *biases)
            yield Fold(f"{name}.wv", makes, (module.wo.weight,), met.get(f"{name}.wo", ()), channel_D=channel_D)
    else:
        assert isinstance(module, LatentAttention), "a third kind of attention"
        inputs = [module.wq if module.wq_down is None else module.wq_down, module.wkv_down]
        nope = module.spec.head_dim - module.own.rope_dim
        values = module.wkv.weight.unflatten(0, (module.spec.heads, -1))[:, nope:]
        yield Fold(f"{name}.wkv", (values,), (module.wo.weight,), met.get(f"{name}.wo", ()))
        if module.q_norm is not None:
            q_norm = (module.q_norm.weight,)
            yield Fold(f"{name}.q_norm", q_norm, (module.wq.weight,), met.get(f"{name}.wq", ()))
    names = [f"{name}.{part}" for part, matrix in module.named_children() if any(matrix is one for one in inputs)]
    seen = [one for matrix in names for one in met.get(matrix, ())]
    yield Fold(f"{name}_norm", (norm.weight,), [matrix.weight for matrix in inputs], seen)


def _of_hidden(ffn: FeedForward, name: str, met: Mapping[str, list[Seen]]) -> Iterator[Fold]:
    rows = _linear_rows(ffn.act, ffn.w_in.weight)
    if rows is not None:
        yield Fold(f"{name}.w_in", (rows,), (ffn.w_out.weight,), met.get(f"{name}.w_out", ()))


def _of_experts(ffn: MoE, met: Mapping[str, list[Seen]]) -> Iterator[Fold]:
    experts = ffn.experts
    for e, seen in enumerate(met.get("ffn.experts.w_out", ())):
        rows = _linear_rows(experts.act, experts.w_in[e])
        bias = None if experts.b_in is None else _linear_rows(experts.act, experts.b_in[e])
        if rows is not None:
            makes = (rows,) if bias is None else (rows, bias)
            yield Fold(f"ffn.experts.w_in[{e}]", makes, (experts.w_out[e].mT,), (seen,))


def _linear_rows(act: object, w_in: Tensor) -> Tensor | None:
    """The rows in which hidden units are linear: up projections, and all of ReLU, whose s > 0 it lets pass."""
    if act is ACTIVATIONS["swiglu"]:
        return w_in.chunk(2)[1]
    return w_in if act is ACTIVATIONS["relu"] else None


def _apply(fold: Fold, alpha: float) -> Tensor:
    """Find s and multiply and divide by it."""
    depth = fold.meets[0].shape[-1]
    channel_D = torch.arange(depth) if fold.channel_D is None else fold.channel_D
    peak_D = torch.stack([seen.peak_D for seen in fold.seen]).amax(0)
    most_D = torch.stack([w.reshape(-1, depth).abs().amax(0).float() for w in fold.meets]).amax(0)
    peak_C, most_C = (_largest(x_D, channel_D) for x_D in (peak_D, most_D))
    s_C = (peak_C.log2() * alpha - most_C.log2() * (1 - alpha)).round().clamp(-LIMIT, LIMIT).exp2()
    s_C = torch.where((peak_C > 0) & (most_C > 0), s_C, 1.0)
    s_D = s_C[channel_D]
    for made in fold.makes:
        made.div_((s_C.view(*made.shape[:-1], 1) if made.ndim > 1 else s_C).to(made.dtype))
    for weight in (*fold.meets, *fold.routes):
        weight.mul_(s_D.to(weight.dtype))
    for seen in {id(seen): seen for seen in fold.seen}.values():  # matrices that meet the same rows share theirs
        seen.peak_D /= s_D
        seen.square_D /= s_D.square()
        if seen.gram_DD is not None:
            seen.gram_DD /= s_D[:, None] * s_D
    return s_C


def _largest(x_D: Tensor, channel_D: Tensor) -> Tensor:
    """The maximum over channels that share an s."""
    x_C = x_D.new_zeros(int(channel_D.max()) + 1)
    return x_C.scatter_reduce(0, channel_D, x_D, "amax")
