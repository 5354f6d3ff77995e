"""Adafactor (Shazeer & Stern 1804.04235): second moments of a matrix held as its rows' and its columns' means.

What the paper's relative step sizes do, the schedule does: the rate is the group's. There is no first moment.

E experts, R rows, C columns, t steps.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...parallel.whole import Whole
from .plain import PlainOptimizer

FACTORS: Mapping[str, int] = {"row_square": -1, "column_square": -2}  # state → the parameter's axis it is a mean over
DECAY = 0.8
EPS = 1e-30
CLIP = 1.0


class Adafactor(PlainOptimizer):
    """AdaGrad's direction from factored squares, for matrices [R, C] and stacks of them [E, R, C] (algorithm 4).

        r_R ← β r_R + (1 - β) mean_C(g² + ε)     c_C ← β c_C + (1 - β) mean_R(g² + ε)     β = 1 - t⁻⁰·⁸, ε = 1e-30
        u = g / √(r_R c_C / mean(r_R))           w ← (1 - lr · decay) w - lr · u / max(1, rms(u))

    Every matrix of a stack is a matrix of its own, its clip by rms(u) too, so experts may lie on any ranks. Vectors
    (algorithm 5) keep all their squares. The state is float32: [E, R] and [E, C]. A matrix that ranks hold in slices is
    computed whole, on one of them, which alone has its state (parallel/whole.py).

    Args:
        params: parameters or groups of them.
        lr: peak learning rate.
        weight_decay: decoupled decay, times the learning rate.
        whole: brings divided matrices together; None = none is divided.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        whole: Whole | None = None,
    ) -> None:
        self.whole = whole or Whole()
        super().__init__(params, {"lr": lr, "peak": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for some in self.whole.batches([weight for weight in group["params"] if weight.grad is not None]):
                grads = {weight: weight.grad.float() for weight in some if weight.grad is not None}
                whole = self.whole.gather(grads)
                updates = {weight: clip_rms(self._direction(weight, grad)) for weight, grad in whole.items()}
                for weight, update in self.whole.own(updates, grads).items():
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"])

    def _direction(self, weight: nn.Parameter, grad: Tensor) -> Tensor:
        """Update the squares; the gradient over the root of their estimate."""
        state = self.state[weight]
        if not state:
            shapes = state_shapes(tuple(grad.shape))
            state.update({key: torch.zeros(shape, device=weight.device) for key, shape in shapes.items()}, step=0)
        state["step"] += 1
        square, new = grad.square() + EPS, state["step"] ** -DECAY
        if grad.ndim < 2:
            return grad * state["square"].lerp_(square, new).rsqrt()
        row, column = (state[key].lerp_(square.mean(axis), new) for key, axis in FACTORS.items())
        return grad * (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def state_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors that a parameter of this shape, or a place in one, has as its state."""
    if len(shape) < 2:
        return {"square": shape}
    return {key: shape[:axis] + shape[len(shape) + axis + 1 :] for key, axis in FACTORS.items()}


def clip_rms(update: Tensor) -> Tensor:
    """Each matrix (or the vector) scaled down to a root mean square of 1 (section 6, d = 1)."""
    matrix = tuple(range(-min(update.ndim, 2), 0))
    return update / (update.square().mean(matrix, keepdim=True).sqrt() / CLIP).clamp(min=1.0)
