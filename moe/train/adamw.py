"""AdamW whose step is one pass over memory."""

from typing import Any

import torch
from torch import Tensor, optim

from ...kernels import adamw_step
from ...parallel.engine.update import ScaledOptimizer
from .plain import PlainOptimizer


class AdamW(PlainOptimizer, optim.AdamW, ScaledOptimizer):
    """PyTorch's AdamW (Loshchilov & Hutter 1711.05101), its settings and states; on a GPU its fused kernel too.

    On a CPU gradients may be of a narrower type than their parameters.
    """

    @torch.no_grad()
    def step(self, closure: None = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient, by `scale` times that gradient, which may be lost."""
        groups = self.param_groups
        moved = [(group, weight) for group in groups for weight in group["params"] if weight.grad is not None]
        if all(weight.is_cpu for _, weight in moved):
            for group, weight in moved:
                self._move(group, weight, scale)
            return
        for _, weight in moved:
            weight.grad.mul_(scale)
        super().step()

    def _move(self, group: dict[str, Any], weight: Tensor, scale: float) -> None:
        state = self.state[weight]
        assert weight.grad is not None, "only what has a gradient moves"
        if not state:
            state.update({key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}, step=torch.zeros(()))
        state["step"] += 1
        adamw_step(
            weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], step=int(state["step"]), lr=float(group["lr"]),
            betas=group["betas"], eps=group["eps"], decay=group["weight_decay"], scale=scale,
        )  # fmt: skip
