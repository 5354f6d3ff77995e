"""How many weights go, and how freely they are chosen: no torch."""

from dataclasses import dataclass

from ...configs.typed import check


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """A share of zeros.

    Args:
        share: of a matrix's weights.
        span: neighbours along the input width of which exactly that share goes; null = anywhere. What is written 2:4,
            two kept of four, is share=0.5, span=4 (Mishra et al. 2104.08378).
    """

    share: float = 0.5
    span: int | None = None

    def __post_init__(self) -> None:
        check(0 <= self.share <= 1, "sparsity.share", self.share, "must lie in [0, 1]", "use 0.5")
        if self.span is not None:
            check(self.span >= 1, "sparsity.span", self.span, "must be at least 1", "use 4")
            count = self.share * self.span
            rule, fix = f"must be a whole number of {self.span} neighbours", f"use {round(count)}/{self.span}"
            check(abs(count - round(count)) < 1e-9, "sparsity.share", self.share, rule, fix)
