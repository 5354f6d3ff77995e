"""Dynamic loss scaling for float16 (Micikevicius et al. 1710.03740): small gradients are lifted above its underflow.

The caller multiplies its losses by `factor`; the engine divides the reduced float32 gradients by it, before norm, clip
and vote. A step whose gradients are not finite on any rank halves it on all, enough good ones in a row double it. It is
a power of two, so that neither multiplying nor dividing rounds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

FIRST, FLOOR = 2.0**16, 1.0


@dataclass
class LossScale:
    """The factor and its history, the same on every rank; part of a checkpoint.

    Attributes:
        factor: what the next losses are multiplied by.
        good: finite steps in a row at this factor.
        grow_after: so many of them double it.
    """

    factor: float = FIRST
    good: int = 0
    grow_after: int = 2000

    def unscale(self, grads: Iterable[Tensor]) -> None:
        """Divide gradients by the factor, in place."""
        for grad in grads:
            grad.mul_(1 / self.factor)

    def update(self, finite: bool) -> bool:
        """Take note of a step's vote.

        Returns:
            whether the factor was to blame and is lower now, so that the same batch is worth another try. At the floor
            it is not: then the batch is broken at every factor, and the search begins anew.
        """
        self.good = self.good + 1 if finite else 0
        if self.good == self.grow_after:
            self.factor, self.good = 2 * self.factor, 0
        if finite:
            return False
        lower = self.factor > FLOOR
        self.factor = self.factor / 2 if lower else FIRST
        return lower
