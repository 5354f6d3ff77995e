"""How a model's matrices are stored in eight or four bits: a frozen dataclass, validated at birth."""

from dataclasses import dataclass, replace
from typing import Literal

from ..configs.typed import check, check_choices

BLOCK = 64  # numbers along the input width that kernels take at once; a group is a multiple of it


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Every matrix of attention, feed-forward networks and experts; routers, norms and biases stay as they are.

    Args:
        bits: 8 or 4.
        kind: whole numbers, or `float`, e4m3 of eight bits.
        group: numbers along the input width that share a scale; null = a whole row.
        zero: whether a row's or group's numbers have a zero point (asymmetric).
        rows: how the rows that meet a matrix are taken: `float`, as they are, or `int8`, rounded as they come (W8A8).
        embedding: whether the embedding, and a head that is not tied to it, are rounded too, to eight bits a row.
    """

    bits: Literal[8, 4] = 8
    kind: Literal["int", "float"] = "int"
    group: int | None = None
    zero: bool = False
    rows: Literal["float", "int8"] = "float"
    embedding: bool = True

    def __post_init__(self) -> None:
        check_choices(self, "quantization")
        plain = self.kind == "int" or (self.bits == 8 and not self.zero and self.group is None and self.rows == "float")
        rule = "goes with bits=8, a scale a row, no zero points and rows=float"
        check(plain, "quantization.kind", self.kind, rule, "use kind=int")
        fits = self.group is None or (self.group >= BLOCK and self.group % BLOCK == 0)
        rule = f"must be a multiple of {BLOCK}"
        check(fits, "quantization.group", self.group, rule, f"use {BLOCK}, or null for a scale a row")
        fits = self.group is not None or self.bits == 8
        check(fits, "quantization.group", None, "is needed for four bits", f"use {BLOCK}")

    def of_width(self, depth: int) -> "QuantizationConfig":
        """How a matrix of input width `depth` is stored: in eight bits a row where groups do not divide it."""
        return self if self.group is None or depth % self.group == 0 else replace(self, bits=8, group=None)

    @property
    def of_vocabulary(self) -> "QuantizationConfig":
        """How embedding and head are stored."""
        return replace(self, bits=8, kind="int", group=None, zero=False, rows="float")
