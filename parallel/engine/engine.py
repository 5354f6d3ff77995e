"""What every training engine does: gradients of a step's micro-batches, then one step, the same on every rank.

    engine.accumulate(count, inputs, loss)   # forward and backward of micro-batches, gradients summed over ranks
    result = engine.step()                   # norm, vote, clip, optimizers; gradients are gone afterwards
    with engine.whole():                     # around whatever reads or fills the model
        engine.gather_state()                # before a checkpoint reads the optimizers' states
        engine.scatter_state()               # after a checkpoint filled them and the model

Losses are sums divided by a global token count, so every reduction is a plain SUM in float32 (float64 stays) and
nothing is divided.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..mesh import Mesh
from .scale import LossScale

Inputs = Callable[[int], tuple[Any, ...]]
Loss = Callable[[int, Any], Tensor]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        grad_norm: L2 norm of the global batch's gradient, before the clip.
        clip: what the gradients were multiplied by.
        finite: False when a gradient of any rank was not; then no parameter moved on any rank.
        rescaled: that was at a loss scale which has been lowered: the same batch is worth another try.
    """

    grad_norm: float
    clip: float
    finite: bool
    rescaled: bool = False


class Engine(ABC):
    """Trains `model` on all ranks of `mesh`.

    Attributes:
        model: already parallelized; evaluate and save this very object.
        optimizers: stepped in order; set their learning rates through `param_groups`.
        mesh: the layout.
        clip: largest gradient norm; None = no limit.
        dtype: of the forward pass under autocast; None = as the parameters are.
        keeps_zeros: names of parameters whose zeros stay: their gradient there is zero.
        scale: what callers multiply their losses by (balance losses too), in float16; None = nothing.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    mesh: Mesh
    clip: float | None
    dtype: torch.dtype | None = None
    keeps_zeros: frozenset[str] = frozenset()
    scale: LossScale | None = None

    @property
    def loss_scale(self) -> float:
        """`scale.factor`, 1 without."""
        return 1.0 if self.scale is None else self.scale.factor

    @abstractmethod
    def step(self) -> StepResult:
        """Vote, clip and step; the gradients are dropped either way. Collective."""

    @abstractmethod
    def accumulate(self, count: int, inputs: Inputs, loss: Loss, seen: Callable[[int], None] | None = None) -> None:
        """The gradient of an optimizer step, summed over its micro-batches and ranks. Collective.

        Args:
            count: micro-batches of this rank, the same number on every rank.
            inputs: micro-batch → the model's arguments.
            loss: (micro-batch, what the model returned) → this rank's part of the global batch's loss. Called in the
                order of the micro-batches, where the model's output is.
            seen: called in that order on every rank, when a micro-batch's forward pass (and loss) is done here.

        Raises:
            PeerError: a peer died or hangs.
        """

    def infer(self, *args: Any) -> Tensor | None:
        """The model's output, without anything for a backward pass; None where it is on other ranks. Collective."""
        output: Tensor = self.model(*args)
        return output

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(self.mesh.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def whole(self) -> AbstractContextManager[None]:
        """Parameters are what `shards` says, to read and to fill; some engines leave nothing of them in between.

        Collective.
        """
        return nullcontext()

    def gather_state(self) -> None:  # noqa: B027 (most engines have nothing to do)
        """Make `optimizers[i].state[parameter]` current: it always is, unless an engine holds it elsewhere."""

    def scatter_state(self) -> None:  # noqa: B027 (likewise)
        """Take over what was written into the model and `optimizers[i].state`."""


class DirectEngine(Engine):
    """One whose ranks hold all layers: a micro-batch's backward pass follows its forward pass."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, prepared for `backward`; every loss must derive from what it returns."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add this micro-batch's gradients; with `last`, sum them over the ranks (collective).

        Raises:
            PeerError: a peer died or hangs.
        """

    def accumulate(self, count: int, inputs: Inputs, loss: Loss, seen: Callable[[int], None] | None = None) -> None:
        for micro in range(count):
            mine = loss(micro, self.forward(*inputs(micro)))
            if seen is not None:
                seen(micro)
            self.backward(mine, last=micro == count - 1)
