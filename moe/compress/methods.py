"""What is done to one block, and what becomes of the configuration. F output width, D input width, E experts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import QuantizedWeight
from ..config import ModelConfig
from ..families.reading import ForeignSource, OwnSource
from ..layers.block import Block
from ..layers.experts import Experts
from ..layers.linear import Linear
from ..layers.moe import MoE
from ..layers.quantized import QuantizedExperts, QuantizedLinear, matrices, stacks
from .channels import narrow_block, narrower
from .clipping import ScaleRule
from .config import SPARSE, CompressConfig
from .experts import fewer_experts, prune_experts
from .gptq import Fitted, gptq
from .merging import merge_experts
from .pruning import Pruned, prune
from .rounding import round_weight
from .routed import Routed
from .scores import global_shares
from .seen import Seen
from .smooth import smooth
from .watch import Met

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
    return cfg if how.quantization is None else replace(cfg, quantization=how.quantization)


@dataclass(frozen=True)
class Method:
    """What is done to every block.

    Attributes:
        how: in a person's words.
        target: the model to be.
        shares: of zeros, by matrix, where all of them share one threshold.
    """

    how: CompressConfig
    target: ModelConfig
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, how: CompressConfig, source: OwnSource | ForeignSource) -> "Method":
        """With what must be known of all blocks before the first."""
        after = target(source.cfg, how)
        if how.scope == "layer":
            return cls(how, after)
        return cls(how, after, global_shares(lambda: whole_matrices(source), how.sparsity))

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
        if how.method == "channels":
            return narrow_block(block, self.target, met, how.min_rows)
        if how.routed:
            return self._fewer(block, Routed.joined(routed)) if isinstance(block.ffn, MoE) else {}
        return self._zero(block, met) if how.method in SPARSE else self._round(block, met)

    def _fewer(self, block: Block, routed: Routed) -> Notes:
        """Fewer experts."""
        assert self.how.num_experts is not None
        if self.how.method == "merge":
            return merge_experts(block, self.how.num_experts, routed)
        return prune_experts(block, self.how.num_experts, routed, self.how.by)

    def _zero(self, block: Block, met: Met) -> Notes:
        """Zeros in every matrix."""
        how, found = self.how, list[Pruned]()
        method: Any = how.method

        def zeroed(matrix: Matrix) -> Tensor:
            zeros = replace(how.zeros, share=self.shares.get(matrix.stack, how.zeros.share))
            rows = how.min_rows if matrix.expert else 1
            new_FD, pruned = prune(
                matrix.w_FD, matrix.seen, zeros, method, name=matrix.name, min_rows=rows, damp=how.damp
            )
            found.append(pruned)
            return new_FD

        for name, linear in matrices(block):
            linear.weight = _fixed(zeroed(_of_linear(block, name, linear, met)))
        for name, experts in stacks(block):
            w_in, w_out = ([zeroed(matrix) for matrix in stack] for stack in _of_experts(block, name, experts, met))
            experts.w_in, experts.w_out = _fixed(torch.stack(w_in)), _fixed(torch.stack(w_out).mT)
        lost, all_of_it = (sum(getattr(one, of) or 0.0 for one in found) for of in ("error", "energy"))
        return {
            "zeros": sum(one.sparsity for one in found) / len(found),
            "error": lost / all_of_it if all_of_it else None,
            "by_weights": {one.name: one.fallback for one in found if one.fallback},
        }

    def _round(self, block: Block, met: Met) -> Notes:
        """Rounded layers in the places of whole ones."""
        how, found = self.how, list[Fitted]()
        assert how.quantization is not None
        form = how.quantization
        rule = ScaleRule(clip=how.clip, percentile=how.percentile, whole=how.scale == "tensor")

        def rounded(matrix: Matrix) -> QuantizedWeight:
            cfg = form.of_width(matrix.w_FD.shape[1])
            if how.method != "gptq":
                return round_weight(matrix.w_FD, cfg, rule, matrix.seen, name=matrix.name)
            made, fitted = gptq(
                matrix.w_FD, matrix.seen, cfg, rule, name=matrix.name, damp=how.damp, act_order=how.act_order,
                min_rows=how.min_rows if matrix.expert else 1,
            )  # fmt: skip
            found.append(fitted)
            return made

        for name, linear in list(matrices(block)):
            made = rounded(_of_linear(block, name, linear, met))
            block.set_submodule(name, QuantizedLinear(made, linear.bias))
        for name, experts in list(stacks(block)):
            w_in, w_out = ([rounded(matrix) for matrix in stack] for stack in _of_experts(block, name, experts, met))
            block.set_submodule(name, QuantizedExperts(experts, stacked(w_in), stacked(w_out)))
        before, after = (sum(getattr(one, of) for one in found) for of in ("before", "after"))
        by_weights = {one.name: one.fallback for one in found if one.fallback}
        return {"error": after / before if before else None, "by_weights": by_weights}


@dataclass(frozen=True)
class Matrix:
    """A matrix as methods see it: rows over the input width.

    Attributes:
        name: in the model, with an expert's number.
        stack: without it.
        w_FD: whole weights.
        seen: what it met; nothing where nobody looked.
        expert: whether it is an expert's.
    """

    name: str
    stack: str
    w_FD: Tensor
    seen: Seen
    expert: bool = False


def _of_linear(block: Block, name: str, linear: Linear, met: Met) -> Matrix:
    whole = f"blocks.{block.layer}.{name}"
    seen = met[name][0] if name in met else Seen.nothing(linear.in_features, gram=True)
    return Matrix(whole, whole, linear.weight, seen)


def _of_experts(block: Block, name: str, experts: Experts, met: Met) -> Iterator[list[Matrix]]:
    """The matrices of `w_in`, then of `w_out`."""
    for stack, w_EFD in (("w_in", experts.w_in), ("w_out", experts.w_out.mT)):
        whole, seen = f"blocks.{block.layer}.{name}.{stack}", met.get(f"{name}.{stack}")
        nothing = Seen.nothing(w_EFD.shape[2], gram=True)
        yield [
            Matrix(f"{whole}[{e}]", whole, w_FD, seen[e] if seen else nothing, expert=True)
            for e, w_FD in enumerate(w_EFD)
        ]


def stacked(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Matrices of one form as a stack."""
    first = parts[0]
    whole: dict[str, Any] = {
        field.name: torch.stack([getattr(part, field.name) for part in parts])
        for field in fields(first)
        if isinstance(value := getattr(first, field.name), Tensor) and value.numel()
    }
    return replace(first, **whole)


def whole_matrices(source: OwnSource | ForeignSource) -> Iterator[tuple[str, Tensor]]:
    """Every matrix and stack that can be made smaller, by its name in the model, one at a time."""
    for index in range(source.cfg.layers):
        with torch.device("meta"):
            block = Block(source.cfg, index)
        for name, _ in matrices(block):
            yield f"blocks.{index}.{name}", source.read(f"blocks.{index}.{name}.weight")
        for name, _ in stacks(block):
            for stack in ("w_in", "w_out"):
                yield f"blocks.{index}.{name}.{stack}", source.read(f"blocks.{index}.{name}.{stack}")


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)
