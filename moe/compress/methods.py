"""What is done to one block, and what becomes of the configuration. F output width, D input width, E experts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import QuantizedWeight
from ..config import ModelConfig
from ..families.reading import ForeignSource, OwnSource
from ..layers.block import Block
from ..layers.quantized import QuantizedExperts, QuantizedLinear, matrices, round_to, stacks
from ..quantization_config import QuantizationConfig
from .config import SPARSE, CompressConfig
from .pruning import Pruned, prune
from .scores import global_shares
from .seen import Seen
from .watch import Met

Notes = dict[str, Any]


def target(cfg: ModelConfig, how: CompressConfig) -> ModelConfig:
    """The configuration of the compressed model.

    Raises:
        ConfigError: the model can not become that.
    """
    return cfg if how.quantization is None else replace(cfg, quantization=how.quantization)


@dataclass(frozen=True)
class Method:
    """What is done to every block.

    Attributes:
        how: in a person's words.
        shares: of zeros, by matrix, where all of them share one threshold.
    """

    how: CompressConfig
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, how: CompressConfig, source: OwnSource | ForeignSource) -> "Method":
        """With what must be known of all blocks before the first."""
        if how.scope == "layer":
            return cls(how)
        return cls(how, global_shares(lambda: whole_matrices(source), how.sparsity))

    @torch.no_grad()
    def apply(self, block: Block, met: Met) -> Notes:
        """Change `block`, of whole float32 weights, in place.

        Args:
            met: what its matrices met; empty where the method needs no text.

        Returns:
            what there is to tell.

        Raises:
            NonFiniteError: of the rows that were seen.
        """
        if self.how.method in SPARSE:
            return self._zero(block, met)
        assert self.how.quantization is not None
        return round_block(block, self.how.quantization)

    def _zero(self, block: Block, met: Met) -> Notes:
        """Zeros in every matrix."""
        found: list[Pruned] = []

        def zeroed(name: str, w_FD: Tensor, seen: Seen, expert: str = "") -> Tensor:
            how, whole = self.how, f"blocks.{block.layer}.{name}"
            zeros = replace(how.zeros, share=self.shares.get(whole, how.zeros.share))
            method: Any = how.method
            rows = how.min_rows if expert else 1
            new_FD, pruned = prune(w_FD, seen, zeros, method, name=whole + expert, min_rows=rows, damp=how.damp)
            found.append(pruned)
            return new_FD

        for name, linear in matrices(block):
            linear.weight = _fixed(zeroed(name, linear.weight, _first(met, name, linear.in_features)))
        for name, experts in stacks(block):
            for stack in ("w_in", "w_out"):
                whole = getattr(experts, stack)
                parts = [w if stack == "w_in" else w.mT for w in whole]
                seen = met.get(f"{name}.{stack}") or [Seen.nothing(part.shape[1], gram=False) for part in parts]
                new = [zeroed(f"{name}.{stack}", w, seen[e], f"[{e}]") for e, w in enumerate(parts)]
                setattr(experts, stack, _fixed(torch.stack([w if stack == "w_in" else w.mT for w in new])))
        lost, all_of_it = (sum(getattr(one, of) or 0.0 for one in found) for of in ("error", "energy"))
        return {
            "zeros": sum(one.sparsity for one in found) / len(found),
            "error": lost / all_of_it if all_of_it else None,
            "by_weights": {one.name: one.fallback for one in found if one.fallback},
        }


def round_block(block: Block, cfg: QuantizationConfig) -> Notes:
    """Put rounded layers in the places of whole ones."""
    for name, linear in list(matrices(block)):
        block.set_submodule(name, QuantizedLinear(round_to(linear.weight, cfg), linear.bias))
    for name, experts in list(stacks(block)):
        w_in = stacked([round_to(w_FD, cfg) for w_FD in experts.w_in])
        w_out = stacked([round_to(w_FD.mT, cfg) for w_FD in experts.w_out])
        block.set_submodule(name, QuantizedExperts(experts, w_in, w_out))
    return {}


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


def _first(met: Met, name: str, depth: int) -> Seen:
    return met[name][0] if name in met else Seen.nothing(depth, gram=False)


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)
