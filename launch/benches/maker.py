"""Makes the inputs of a bench's cases."""

from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from .ceilings import pages

COLD = 1 << 27  # bytes of weights or pages that calls go round in
DTYPE = torch.bfloat16


class Maker:
    """Makes inputs on a device: numbers of a fixed seed.

    Args:
        device: a CPU or a GPU.
        huge: weights and pages of a CPU lie in huge pages.
        cold: bytes of weights or pages that calls go round in; None = COLD.
    """

    def __init__(self, device: torch.device, *, huge: bool = True, cold: int | None = None) -> None:
        self.device, self.huge = device, huge
        self.cold = COLD if cold is None else cold
        self._generator = torch.Generator(device).manual_seed(0)

    def rows(self, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        """Small random numbers."""
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def weights(self, *shape: int) -> list[Tensor]:
        """As many copies of a weight as are cold together, one at least and sixteen at most."""
        return [self.weight(*shape) for _ in range(min(ceil(self.cold / (2 * prod(shape))), 16) or 1)]

    def weight(self, *shape: int) -> Tensor:
        """One weight; a row of random numbers again and again, since drawing hundreds of megabytes takes long."""
        if self.device.type == "cpu":
            held = pages(shape, DTYPE, huge=self.huge)
        else:
            held = torch.empty(shape, dtype=DTYPE, device=self.device)
        return held.copy_(self.rows(shape[-1]) * 0.02)

    def copy(self, t: Tensor) -> Tensor:
        """The same numbers, in memory as a weight has."""
        return pages(tuple(t.shape), t.dtype, huge=self.huge).copy_(t) if self.device.type == "cpu" else t.clone()

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def routing(self, tokens: int, experts: int, choices: int) -> tuple[Tensor, Tensor]:
        """ids_TK, all different in a row, and weights_TK."""
        scores = torch.rand(tokens, experts, generator=self._generator, device=self.device)
        weights = torch.softmax(self.rows(tokens, choices, dtype=torch.float32), -1)
        return scores.topk(choices).indices, weights

    def tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        """These values there."""
        return torch.tensor(values, dtype=dtype, device=self.device)
