"""What is done to one block, and what becomes of the configuration. F output width, D input width, E experts."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import QuantizedWeight
from ..config import ModelConfig
from ..layers.block import Block
from ..layers.moe import MoE
from ..layers.quantized import QuantizedExperts, QuantizedLinear, matrices, stacks
from .channels import narrow_block, narrower
from .clipping import ScaleRule
from .config import SPARSE, CompressConfig
from .experts import fewer_experts, prune_experts
from .gptq import Fitted, gptq
from .joint import prune_and_round
from .layers import shallower, spread
from .merging import merge_experts
from .pruning import Pruned, prune_block, told
from .rounding import round_weight
from .routed import Routed
from .scores import global_shares
from .sensitivity import allocate, read_scan
from .smooth import smooth
from .watch import Met, places

Notes = dict[str, Any]


def target(cfg: ModelConfig, how: CompressConfig) -> ModelConfig:
    """The configuration of the compressed model.

    Raises:
        ConfigError: the model can not become that.
    """
    if how.num_experts is not None and how.routed:
        return fewer_experts(cfg, how.num_experts)
    if how.method == "channels":
        return narrower(cfg, how.keep)
    if how.num_layers is not None and how.method == "layers":
        return shallower(cfg, spread(cfg, how.num_layers))
    return cfg if how.quantization is None else replace(cfg, quantization=how.quantization)


@dataclass(frozen=True)
class Method:
    """What is done to every block.

    Attributes:
        how: in a person's words.
        target: the model to be.
        kept: ids of the blocks that stay.
        shares: of zeros, by block and matrix, where all of them have one threshold.
    """

    how: CompressConfig
    target: ModelConfig
    kept: Sequence[int]
    shares: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, how: CompressConfig, cfg: ModelConfig, load: Callable[[int], Block]) -> "Method":
        """With what must be known of all blocks before the first; `load` gives block i of the model `cfg`."""

        def every() -> Iterator[tuple[str, Tensor]]:
            for index in range(cfg.layers):
                yield from ((f"{index}.{name}", w_FD) for name, w_FD, *_ in places(load(index)))

        shares = defaultdict[int, dict[str, float]](dict)
        for name, share in (global_shares(every, how.sparsity) if how.scope == "global" else {}).items():
            block, _, matrix = name.partition(".")
            shares[int(block)][matrix] = share
        if how.shares is not None:
            sizes = {i: {name: w_FD.numel() for name, w_FD, *_ in places(load(i))} for i in range(cfg.layers)}
            whole = {str(i): sum(one.values()) for i, one in sizes.items()}
            for layer, share in allocate(read_scan(how.shares, cfg.layers), whole, how.sparsity).items():
                shares[int(layer)] = dict.fromkeys(sizes[int(layer)], share)
        kept = spread(cfg, how.num_layers or cfg.layers) if how.method == "layers" else range(cfg.layers)
        return cls(how, target(cfg, how), kept, shares)

    @torch.no_grad()
    def apply(self, block: Block, met: Met, routed: Sequence[Routed]) -> Notes:
        """Change `block`, of whole float32 weights, in place.

        Args:
            met: what its matrices met; empty where the method needs no text.
            routed: where its tokens went, of a sparse block and a method that asks.

        Returns:
            what there is to tell.

        Raises:
            NonFiniteError: of the rows that were seen.
        """
        how = self.how
        if how.migration is not None:
            smooth(block, met, how.migration)
        if how.method == "layers":
            return {}
        if how.method == "channels":
            return narrow_block(block, self.target, met, how.min_rows)
        if how.routed:
            return self._fewer(block, Routed.joined(routed)) if isinstance(block.ffn, MoE) else {}
        if how.method in SPARSE and how.quantization is None:
            return prune_block(block, met, how, self.shares.get(block.layer, {}))
        return self._round(block, met)

    def _fewer(self, block: Block, routed: Routed) -> Notes:
        """Fewer experts."""
        assert self.how.num_experts is not None
        if self.how.method == "merge":
            return merge_experts(block, self.how.num_experts, routed)
        return prune_experts(block, self.how.num_experts, routed, self.how.by)

    def _round(self, block: Block, met: Met) -> Notes:
        """Rounded layers in the places of whole ones."""
        how, made = self.how, defaultdict[str, list[QuantizedWeight]](list)
        fitted, pruned, shares = list[Fitted](), list[Pruned](), self.shares.get(block.layer, {})
        assert how.quantization is not None
        rule = ScaleRule(clip=how.clipping, percentile=how.percentile, whole=how.scale == "tensor")
        for name, w_FD, stack, expert in places(block):
            cfg = how.quantization.of_width(w_FD.shape[1])
            settings: dict[str, Any] = {"damp": how.damp, "min_rows": how.min_rows if name != stack else 1}
            if how.method == "gptq":
                w, one = gptq(w_FD, met[stack][expert], cfg, rule, name=name, act_order=how.act_order, **settings)
                fitted.append(one)
            elif how.method == "sparsegpt":
                zeros = replace(how.zeros, share=shares.get(name, how.zeros.share))
                w, thinned = prune_and_round(w_FD, met[stack][expert], zeros, cfg, rule, name=name, **settings)
                pruned.append(thinned)
            else:
                w = round_weight(w_FD, cfg, rule, met[stack][expert] if met else None, name=name)
            made[stack].append(w)
        for name, linear in list(matrices(block)):
            block.set_submodule(name, QuantizedLinear(made[name][0], linear.bias))
        for name, experts in list(stacks(block)):
            w_in, w_out = (stacked(made[f"{name}.{stack}"]) for stack in ("w_in", "w_out"))
            block.set_submodule(name, QuantizedExperts(experts, w_in, w_out))
        if pruned:
            return told(pruned)
        before, after = (sum(getattr(one, of) for one in fitted) for of in ("before", "after"))
        by_weights = {one.name: one.fallback for one in fitted if one.fallback}
        return {"error": after / before if before else None, "by_weights": by_weights}


def stacked(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Matrices of one form as a stack."""
    first = parts[0]
    whole: dict[str, Any] = {
        field.name: torch.stack([getattr(part, field.name) for part in parts])
        for field in fields(first)
        if isinstance(value := getattr(first, field.name), Tensor) and value.numel()
    }
    return replace(first, **whole)
