"""Moments in bfloat16: computed in float32, rounded stochastically as they are stored, and AdamW on them.

A moving average moves by less than half of bfloat16's last place when 1 - β is below about 1/256: to nearest, it would
then stand still. A stochastic rounding is right on average. Its draws are named by (seed, parameter's name, step, place
in the global parameter), so layouts and resumed runs round alike.

R rows of a parameter, C its last dimension.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import uniform
from ...kernels.random import ROUND
from ...parallel.shard import ShardSpec
from .plain import PlainOptimizer

CHUNK = 2**20  # draws at a time: they take more memory than what they round


class Rounding:
    """Stores the moments of parameters in bfloat16.

    Args:
        parameters: name → what this rank holds of it.
        shards: where that lies in the global one; None = all are whole.
        seed: of the run.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], shards: Mapping[str, ShardSpec] | None, seed: int
    ) -> None:
        self._seeds, self._specs = {}, {}
        for name, weight in parameters.items():
            self._seeds[weight] = _seed(f"{seed}/{name}")
            shape = tuple(weight.shape)
            self._specs[weight] = shards[name] if shards else ShardSpec(shape, (0,) * len(shape))

    def store(self, weight: nn.Parameter, step: int, moments: Mapping[Tensor, Tensor]) -> None:
        """Round new float32 moments of `weight` (values) into the bfloat16 ones (keys)."""
        if not weight.numel():
            return
        spec, columns = self._specs[weight], weight.shape[-1]
        whole, first = spec.global_shape[-1], spec.offset[-1]
        stored = [(kept.view(-1, columns), new.reshape(-1, columns)) for kept, new in moments.items()]
        count = whole * len(moments)
        rows_R = _rows(spec, tuple(weight.shape), weight.device)
        for some in torch.arange(len(rows_R), device=weight.device).split(max(1, CHUNK // count)):
            draws = uniform(self._seeds[weight], rows_R[some], step=step, layer=0, purpose=ROUND, count=count)
            for (kept_RC, new_RC), draw_RC in zip(stored, draws.split(whole, dim=1), strict=True):
                kept_RC[some] = round_stochastically(new_RC[some], draw_RC[:, first : first + columns])


def _rows(spec: ShardSpec, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [R], the global number of each row (all but the last dimension, flat) of a local tensor of `shape`."""
    rows = torch.arange(math.prod(spec.global_shape[:-1]), device=device).view(spec.block.global_shape[:-1])
    return rows[spec.place(shape)[:-1]].flatten()


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def round_stochastically(x: Tensor, draw: Tensor) -> Tensor:
    """float32 to one of its two neighbours in bfloat16, the nearer the likelier: up in size when `draw` says so.

    Args:
        x: finite; what bfloat16 has already stays.
        draw: like x, uniform in [0, 1).
    """
    noise = (draw * 2**16).int()
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


class CompactAdamW(PlainOptimizer):
    """AdamW (Loshchilov & Hutter 1711.05101) in float32 with both moments held in bfloat16.

    Args:
        groups: parameters with `lr` and `weight_decay`.
        betas: decay of mean and square.
        eps: added to the root of the square.
        rounding: stores the moments.
    """

    state_dtype = torch.bfloat16

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float, rounding: Rounding
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.rounding = rounding

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    update = self._direction(weight, weight.grad.float(), group["betas"], group["eps"])
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"])

    def _direction(self, weight: nn.Parameter, grad: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
        """Update the moments; mean over root of square, both without their bias towards zero."""
        (beta1, beta2), state = betas, self.state[weight]
        if not state:
            state.update({key: torch.zeros_like(weight, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")})
            state["step"] = 0
        state["step"] += 1
        mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp_(grad.square(), 1 - beta2)
        self.rounding.store(weight, state["step"], {state["exp_avg"]: mean, state["exp_avg_sq"]: square})
        bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        return mean / bias1 / ((square / bias2).sqrt() + eps)
