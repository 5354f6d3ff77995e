"""What a rank holds between two steps, however it is divided: weights, gradients, optimizer states. No torch here.

    none            every rank of a stage holds what its layers have: of experts 1 / ep, of attention and of dense
                    feed-forward networks 1 / tp, all else whole
    fsdp            of each matrix every rank that would hold the same has some rows (the first rank the most), of a
                    dense W_in some columns; vectors and routers are whole
    DeepSpeed 1     states of what is not an expert in equal pieces, beside a copy of the weights' piece
              2     the gradients too
              3     the weights too

All numbers are bytes; float32 but for states that `optim.state_dtype` says otherwise of, and for narrow gradients of
experts (`narrow.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

from ...parallel.config import Layout
from .. import shapes
from ..shapes import Part
from .config import RunConfig

WIDE = 4  # bytes of float32: parameters, gradients, optimizer, residual stream
NARROW = 2  # of bfloat16


@dataclass(frozen=True)
class Held:
    """Bytes of one rank that computes `layers`."""

    config: RunConfig
    layout: Layout
    layers: tuple[int, ...]
    narrow: bool = False

    @cached_property
    def parts(self) -> list[Part]:
        """Parameters that the forward pass uses here."""
        return shapes.held(self.config.model, self.layers, self.layout.ep, self.layout.tp)

    @cached_property
    def owned(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Name, shape and number of the parameters whose states are here: under FSDP2 a share of each matrix."""
        return [(part.name, self._share(part), part.times) for part in self.parts]

    def _share(self, part: Part) -> tuple[int, ...]:
        if not self.divides(part):
            return part.shape
        gated = part.name.endswith(".ffn.w_in.weight") and self.config.model.activation.startswith("swiglu")
        cut, shape = int(gated), list(part.shape)
        shape[cut] = ceil(shape[cut] / self.replicas(part))
        return tuple(shape)

    def divides(self, part: Part) -> bool:
        """Whether FSDP2 divides the parameter (`parallel/fsdp.py`)."""
        matrix = len(part.shape) > 1 and not shapes.is_router(part.name)
        return self.config.parallel.fsdp and matrix and self.replicas(part) > 1

    def divided(self, parts: Iterable[Part]) -> int:
        """Numbers of those that FSDP2 divides, gathered."""
        return sum(part.count for part in parts if self.divides(part))

    @cached_property
    def ends(self) -> int:
        """Numbers of embedding and head that FSDP2 gathers for the whole of a forward and a backward pass."""
        return self.divided(part for part in self.parts if "blocks." not in part.name)

    def replicas(self, part: Part) -> int:
        """Ranks that would hold the same."""
        layout = self.layout
        return {"stage": layout.stage, "replicas": layout.dp * layout.cp, "edp": layout.edp}[part.along]

    def count(self, along: str) -> int:
        """Numbers of the parameters used here that ranks along this dimension replicate."""
        return sum(part.count for part in self.parts if part.along == along)

    @property
    def dense(self) -> int:
        """Numbers of what DeepSpeed cuts: the parameters used here that are not an expert's, under ZeRO-3 all."""
        return sum(part.count for part in self.parts if self.zero == 3 or not shapes.is_expert(part.name))

    @cached_property
    def numbers(self) -> int:
        """Numbers of all parameters used here."""
        return sum(part.count for part in self.parts)

    @property
    def zero(self) -> int:
        """DeepSpeed's stage, 0 without it."""
        return self.config.parallel.zero if self.config.engine == "deepspeed" else 0

    @cached_property
    def _own(self) -> int:
        return sum(times * prod(shape) for _, shape, times in self.owned)

    @property
    def _piece(self) -> int:
        """Numbers of ZeRO's piece."""
        return ceil(self.dense / self.layout.stage)

    @property
    def weights(self) -> int:
        """Parameters, and under ZeRO the flat copy that is stepped."""
        whole = self._own - self.dense + self._piece if self.zero == 3 else self._own
        return WIDE * (whole + (self._piece if self.zero else 0))

    @property
    def gradients(self) -> int:
        """As many as parameters, but for ZeRO-2 and ZeRO-3."""
        if self.narrow:
            return WIDE * self.dense + NARROW * (self.numbers - self.dense)
        return WIDE * (self._own - self.dense + self._piece if self.zero > 1 else self._own)

    @cached_property
    def optimizer(self) -> int:
        """AdamW: mean, square and (float32) a counter for each tensor; Muon: a momentum; Adafactor: a row, a column."""
        if self.zero:
            experts = [part for part in self.parts if self.zero < 3 and shapes.is_expert(part.name)]
            return 2 * WIDE * self._piece + sum(part.times * self._state(part.name, part.shape) for part in experts)
        return sum(times * self._state(name, shape) for name, shape, times in self.owned)

    @cached_property
    def workspace(self) -> int:
        """Muon's step: about three bfloat16 copies of all matrices of its most common shape. AdamW works in place.

        Adafactor and AdamW in bfloat16 take about three and five float32 copies of the largest tensor. Zeros that stay
        take a byte a number of the largest matrix or stack.
        """
        optim = self.config.optim
        copies = 3 if optim.name == "adafactor" else 5 if optim.state_dtype == "bfloat16" else 0
        largest = max((prod(shape) for name, shape, _ in self.owned if not self._muon(name, shape)), default=0)
        groups: dict[tuple[object, ...], int] = {}
        for name, shape, times in self.owned:
            if self._muon(name, shape):
                key = (*shape[-2:], name.endswith("w_out"))
                groups[key] = groups.get(key, 0) + times * prod(shape)
        masked = [shape for name, shape, _ in self.owned if shapes.is_hidden_matrix(name, len(shape))]
        muon = 3 * NARROW * max(groups.values(), default=0)
        return max(muon, copies * WIDE * largest, self.config.train.keep_zeros * max(map(prod, masked), default=0))

    def _state(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of a parameter's optimizer state."""
        optim = self.config.optim
        if optim.name == "adafactor" and len(shape) > 1:
            return WIDE * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])
        if optim.name == "adafactor":
            return WIDE * prod(shape)
        number, counter = (2, 0) if optim.state_dtype == "bfloat16" else (WIDE, WIDE)
        return number * prod(shape) if self._muon(name, shape) else 2 * number * prod(shape) + counter

    def _muon(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.config.optim.name == "muon" and shapes.is_hidden_matrix(name, len(shape))
