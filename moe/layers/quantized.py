"""Layers whose matrices are stored in eight or four bits. They stand where the layers of whole weights stood.

T tokens, N rows sorted by expert, K choices, R rows, V vocabulary, D width, F output or hidden width, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...kernels import QuantizedWeight, quantize_weight, quantized_linear, quantized_moe_mlp
from ..quantization_config import QuantizationConfig
from .experts import Experts, owners
from .linear import Linear

ROWS = 512  # rows whose logits exist at once


class Matrix(nn.Module):
    """A `QuantizedWeight` [..., F, D] as buffers, so that it is stored, loaded and moved like any tensor."""

    def __init__(self, w: QuantizedWeight) -> None:
        super().__init__()
        self._plain: dict[str, Any] = {}
        for name, value in ((field.name, getattr(w, field.name)) for field in fields(w)):
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self._plain[name] = value

    @property
    def stored(self) -> QuantizedWeight:
        tensors: dict[str, Any] = self._buffers
        return QuantizedWeight(**self._plain, **tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> "Matrix":
        """Moves of the module change where the matrix lies, not its types: they are what it means."""

        def moved(tensor: Tensor) -> Tensor:
            made: Tensor = fn(tensor)
            return made if made.dtype == tensor.dtype or isinstance(tensor, nn.Parameter) else tensor.to(made.device)

        super()._apply(moved, recurse)
        return self


class QuantizedLinear(Matrix):
    """y = x · ŵᵀ + b."""

    def __init__(self, w: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(w)
        self.bias = bias

    @property
    def out_features(self) -> int:
        return self.stored.q.shape[-2]

    def forward(self, x_TD: Tensor) -> Tensor:
        return quantized_linear(x_TD, self.stored, self.bias)


class QuantizedEmbedding(Matrix):
    """Rows of tokens, and logits where a head is wanted: in eight bits a row.

    Attributes:
        dtype: of the rows that it gives; who loads the model says it.
    """

    dtype = torch.float32

    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.stored[tokens_T].dequantized(self.dtype)

    def project(self, x_RD: Tensor) -> Tensor:
        """Logits [R, V]."""
        return quantized_linear(x_RD, self.stored)

    def losses(self, x_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Cross entropy [T] of the logits, 0 where the target is -1; some rows' logits at a time."""
        return torch.cat(
            [
                functional.cross_entropy(self.project(x_RD).float(), targets_R, ignore_index=-1, reduction="none")
                for x_RD, targets_R in zip(x_TD.split(ROWS), targets_T.split(ROWS), strict=True)
            ]
        )


class QuantizedExperts(nn.Module):
    """`Experts` in eight or four bits.

    Attributes:
        w_in: [E, 2F or F, D]; w_out: [E, D, F], rows over the hidden width.
    """

    def __init__(self, whole: Experts, w_in: QuantizedWeight, w_out: QuantizedWeight) -> None:
        super().__init__()
        self.cfg, self.first, self.act, self.plain = whole.cfg, whole.first, whole.act, whole.plain
        self.w_in, self.w_out = Matrix(w_in), Matrix(w_out)
        self.b_in, self.b_out = whole.b_in, whole.b_out

    def forward(self, x_ND: Tensor, ends_E: Tensor, dropped_NF: Tensor | None = None) -> Tensor:
        """As `Experts.forward` in evaluation, which drops no hidden units."""
        assert dropped_NF is None, "a rounded model is not trained"
        if self.plain:
            owner_N1 = owners(ends_E, len(x_ND))[:, None]
            return self.mix(x_ND, owner_N1, torch.ones(owner_N1.shape, device=x_ND.device), None)
        y_ND, first = torch.empty_like(x_ND), 0
        for expert, last in enumerate(ends_E.tolist()):
            if last > first:
                y_ND[first:last] = self._one(expert, x_ND[first:last])
            first = last
        return y_ND

    def mix(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        """As `Experts.mix`."""
        return quantized_moe_mlp(x_TD, ids_TK, weights_TK, kept_TK, self.w_in.stored, self.w_out.stored)

    def _one(self, expert: int, x_ND: Tensor) -> Tensor:
        b_in, b_out = (None if bias is None else bias[expert] for bias in (self.b_in, self.b_out))
        h_NF = self.act(quantized_linear(x_ND, self.w_in.stored[expert], b_in))
        return quantized_linear(h_NF, self.w_out.stored[expert], b_out)


def matrices(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The projections that are rounded, by name.

    All but a shared expert's gate, which is one row, and the one of latent attention that is read head by head.
    """
    for name, child in module.named_modules():
        if type(child) is Linear and not name.endswith((".wkv", "shared_gate")):
            yield name, child


def stacks(module: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The stacks of experts, by name."""
    for name, child in module.named_modules():
        if isinstance(child, Experts):
            yield name, child


def round_to(w: Tensor, cfg: QuantizationConfig) -> QuantizedWeight:
    """To nearest, as `cfg` stores a matrix of this width."""
    own = cfg.of_width(w.shape[-1])
    return quantize_weight(w, own.bits, own.group, zero=own.zero, kind=own.kind, rows=own.rows)


def store_quantized(model: nn.Module, cfg: QuantizationConfig) -> None:
    """Put layers in the places of those that `cfg` rounds, in shape alone: their numbers are yet to be loaded."""
    for name, linear in list(matrices(model)):
        model.set_submodule(name, QuantizedLinear(_sized(linear.weight.shape, cfg), linear.bias))
    for name, experts in list(stacks(model)):
        count, hidden, width = experts.w_out.shape
        w_in, w_out = _sized(experts.w_in.shape, cfg), _sized((count, width, hidden), cfg)
        model.set_submodule(name, QuantizedExperts(experts, w_in, w_out))
    for name in ("embed", "head") if cfg.embedding else ():
        end = getattr(model, name, None)
        if end is not None:
            setattr(model, name, QuantizedEmbedding(_sized(end.weight.shape, cfg.of_vocabulary)))


def fixed_names(model: nn.Module) -> set[str]:
    """Names of the tensors whose types are what they mean: a model's dtype leaves them as they are."""
    return {
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        if isinstance(module, Matrix)
        for part, _ in module.named_buffers(recurse=False)
    }


def _sized(shape: Sequence[int], cfg: QuantizationConfig) -> QuantizedWeight:
    own, (*stack, depth) = cfg.of_width(shape[-1]), shape
    q_dtype = torch.uint8 if own.bits == 4 else torch.float8_e4m3fn if own.kind == "float" else torch.int8
    groups = stack if own.group is None else [*stack, depth // own.group]
    meta = torch.device("meta")
    q = torch.empty(*stack, depth * own.bits // 8, dtype=q_dtype, device=meta)
    scale = torch.empty(groups, device=meta)
    return QuantizedWeight(q, scale, torch.empty(groups if own.zero else 0, device=meta), own.bits, own.rows)
