"""What the rows that enter a matrix were in calibration. T rows, D input width."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Seen:
    """Sums over the rows x of a matrix y = W · x.

    Attributes:
        count: rows.
        peak_D: float32, max |x| of each channel.
        square_D: float32, Σ x² of each channel.
        gram_DD: float32, Σ x · xᵀ; None where nobody asked for it.
    """

    count: int
    peak_D: Tensor
    square_D: Tensor
    gram_DD: Tensor | None

    @classmethod
    def nothing(cls, depth: int, gram: bool) -> "Seen":
        """Before the first row."""
        zeros_D = torch.zeros(depth)
        return cls(0, zeros_D, zeros_D.clone(), torch.zeros(depth, depth) if gram else None)

    def add(self, x_TD: Tensor) -> None:
        """Take rows in, of any floating dtype."""
        x_TD = x_TD.float()
        if not len(x_TD):
            return
        self.count += len(x_TD)
        self.peak_D = torch.maximum(self.peak_D, x_TD.abs().amax(0))
        self.square_D += x_TD.square().sum(0)
        if self.gram_DD is not None:
            self.gram_DD.addmm_(x_TD.mT, x_TD)

    def lack(self, min_rows: int) -> str | None:
        """Why this is too little to decide anything; None where it is not."""
        if self.count < max(min_rows, 1):
            return f"saw {self.count} rows, fewer than {max(min_rows, 1)}"
        return None if self.square_D.any() else "saw rows of zeros only"
