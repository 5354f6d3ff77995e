"""What `turnout compress` does to a model: a frozen dataclass, validated at birth. No torch here."""

from dataclasses import dataclass, fields
from typing import Literal

from ...configs.typed import check, check_choices
from ..quantization_config import BLOCK, QuantizationConfig
from .sparsity import Sparsity

MethodName = Literal[
    "int8",
    "int4",
    "fp8",
    "w8a8",
    "gptq",
    "magnitude",
    "wanda",
    "sparsegpt",
    "channels",
    "experts",
    "merge",
    "layers",
    "scan",
]
ROUNDING = ("int8", "int4", "fp8", "w8a8", "gptq")
SPARSE = ("magnitude", "wanda", "sparsegpt")
CALIBRATED = ("gptq", "wanda", "sparsegpt", "channels", "experts", "merge")
ROUNDED = ("scale", "group", "zero", "clip", "percentile", "smooth", "embedding")  # how what is rounded is stored
BELONGS = {
    "bits": ("gptq", "sparsegpt"),
    "damp": ("gptq", "sparsegpt"),
    "act_order": ("gptq",),
    "sparsity": SPARSE,
    "pattern": SPARSE,
    "shares": SPARSE,
    "scope": ("magnitude",),
    "keep": ("channels",),
    "num_experts": ("experts", "merge"),
    "num_layers": ("layers",),
    "by": ("experts",),
}
"""The methods of which a setting says something."""


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """One way of making a model smaller.

    Args:
        method: `int8`, `int4`, `fp8` (e4m3): weights to nearest; `w8a8`: rows too, as they come; `gptq`: weights by
            the second moments of what they meet; `magnitude`, `wanda`, `sparsegpt`: zeros; `channels`: fewer hidden
            units; `experts`, `merge`: fewer experts, the others left out or merged into those that stay; `layers`:
            fewer blocks; `scan`: no model, but what zeros cost in each block alone.
        bits: of `gptq`, 8 or 4, null = 4; of `sparsegpt` what the weights that stay are rounded to on the way, null =
            they are not.
        scale: what shares one: the whole matrix, a row, or `group` numbers of a row; null = a row of eight bits, a
            group of four.
        group: numbers of a group.
        zero: zero points (asymmetric).
        clip: the largest number that is kept: the maximum, a percentile, or where the squared error, weighted by what
            calibration shows, is least; null = that for `gptq`, the maximum for the others.
        percentile: of `clip=percentile`.
        smooth: SmoothQuant's migration strength, in (0, 1], before rounding; null = none, of w8a8 0.5.
        embedding: round the embedding and the head too.
        damp: share of the mean diagonal added to second moments (GPTQ, SparseGPT).
        act_order: GPTQ takes columns in the order of their second moments.
        min_rows: an expert that met fewer rows in calibration is handled by its weights alone, and named.
        sparsity: share of zeros.
        pattern: `n:m` keeps n of m numbers along the input width; null = anywhere.
        scope: whether every matrix has the same share of zeros, or the model as a whole (magnitude alone).
        shares: a scan.json: blocks then have shares of zeros that cost alike, `sparsity` of all together.
        keep: share of the hidden units that stay (`channels`).
        num_experts: how many stay (`experts`, `merge`).
        num_layers: how many stay, evenly spaced (`layers`).
        by: what an expert is worth (`experts`): the tokens it computes, the sum of their gates, or how far the layer's
            output moves without it.
        calibration: text: pydocs, or a .jsonl, .jsonl.xz or .txt file; its training split where it has one.
        samples: windows of it.
        seq_len: tokens of a window.
        seed: draws the windows.
    """

    method: MethodName = "int8"
    bits: int | None = None
    scale: Literal["tensor", "channel", "group"] | None = None
    group: int = BLOCK
    zero: bool = False
    clip: Literal["max", "percentile", "mse"] | None = None
    percentile: float = 99.9
    smooth: float | None = None
    embedding: bool = True
    damp: float = 0.01
    act_order: bool = False
    min_rows: int = 32
    sparsity: float = 0.5
    pattern: str | None = None
    scope: Literal["layer", "global"] = "layer"
    shares: str | None = None
    keep: float = 0.5
    num_experts: int | None = None
    num_layers: int | None = None
    by: Literal["load", "gate", "output"] = "output"
    calibration: str = "pydocs"
    samples: int = 32
    seq_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self, "")
        for name, least in (("samples", 1), ("seq_len", 2), ("min_rows", 0)):
            check(getattr(self, name) >= least, name, getattr(self, name), f"must be at least {least}", f"use {least}")
        for name in ("keep", "damp"):
            check(0 < getattr(self, name) <= 1, name, getattr(self, name), "must lie in (0, 1]", "use a share")
        check(self.bits in (None, 4, 8), "bits", self.bits, "must be 4 or 8", "use 4")
        check(0 <= self.sparsity < 1, "sparsity", self.sparsity, "must lie in [0, 1)", "use 0.5")
        check(0 < self.percentile <= 100, "percentile", self.percentile, "must lie in (0, 100]", "use 99.9")
        fits = self.smooth is None or 0 < self.smooth <= 1
        check(fits, "smooth", self.smooth, "must lie in (0, 1]", "use 0.5, or null")
        fits = not self.routed or self.num_experts is not None
        check(fits, "num_experts", None, f"is what method={self.method} needs", "say how many stay")
        fits = self.method != "layers" or self.num_layers is not None
        check(fits, "num_layers", None, "is what method=layers needs", "say how many stay")
        fits = self.shares is None or (self.scope == "layer" and self.pattern is None)
        check(fits, "shares", self.shares, "goes with zeros anywhere and scope=layer", "leave it out")
        fits = self.scope == "layer" or self.pattern is None
        check(fits, "scope", self.scope, "goes with no pattern", "use scope=layer")
        check(
            self.sparsity == 0.5 or self.pattern is None, "sparsity", self.sparsity, "follows from pattern", "leave it"
        )
        self._check_pattern()
        self._check_method()
        self._check_scale()

    @property
    def calibrated(self) -> bool:
        """Whether the method must see text."""
        weighs = self.rounds and self.clip == "mse"
        return self.method in CALIBRATED or self.migration is not None or weighs

    @property
    def clipping(self) -> Literal["max", "percentile", "mse"]:
        """What `clip` means."""
        return self.clip or ("mse" if self.method == "gptq" else "max")

    @property
    def rounds(self) -> bool:
        """Whether weights are stored in eight or four bits afterwards."""
        return self.method in ROUNDING or (self.method == "sparsegpt" and self.bits is not None)

    @property
    def routed(self) -> bool:
        """Whether it must see where tokens go."""
        return self.method in ("experts", "merge")

    @property
    def moments(self) -> bool:
        """Whether it must see x · xᵀ."""
        return self.method in ("gptq", "sparsegpt", "channels")

    @property
    def migration(self) -> float | None:
        """SmoothQuant's strength; null = none."""
        return 0.5 if self.smooth is None and self.method == "w8a8" else self.smooth

    @property
    def zeros(self) -> Sparsity:
        """How many weights go, and how freely they are chosen."""
        if self.pattern is None:
            return Sparsity(share=self.sparsity)
        n, _, m = self.pattern.partition(":")
        return Sparsity(share=1 - int(n) / int(m), span=int(m))

    def _check_method(self) -> None:
        """Refuse a setting, other than it comes, that says nothing of the method."""
        rounding = (*ROUNDING, "sparsegpt") if self.bits is not None else ROUNDING
        for name, methods in {**dict.fromkeys(ROUNDED, rounding), **BELONGS}.items():
            fits = self.method in methods or getattr(self, name) == DEFAULTS[name]
            rule = f"goes with method={', '.join(methods)}, not {self.method}"
            check(fits, name, getattr(self, name), rule, "leave it out, or use such a method")

    def _check_scale(self) -> None:
        """Refuse forms in which no matrix is stored."""
        fits = not self.rounds or self._bits == 8 or self.scale in (None, "group")
        check(fits, "scale", self.scale, "must be group for four bits", "use group, or null")
        fits = self.group >= BLOCK and self.group % BLOCK == 0
        check(fits, "group", self.group, f"must be a multiple of {BLOCK}", f"use {BLOCK}")
        fits = self.method != "fp8" or self.scale != "group"
        check(fits, "scale", self.scale, "must be a row's or the matrix' for method=fp8", "use channel, or null")
        fits = not self.zero or (self.method != "fp8" and self.scale != "tensor")
        check(fits, "zero", self.zero, "goes with whole numbers and a scale a row or group", "use zero=false")
        shared = self.quantization is not None and self.quantization.group is not None
        fits = shared or self.group == DEFAULTS["group"]
        check(fits, "group", self.group, "goes with scale=group", "use scale=group, or leave it out")
        fits = self.clip == "percentile" or self.percentile == DEFAULTS["percentile"]
        check(fits, "percentile", self.percentile, "goes with clip=percentile", "use it, or leave percentile out")

    def _check_pattern(self) -> None:
        n, colon, m = (self.pattern or "2:4").partition(":")
        fits = bool(colon) and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)
        check(fits, "pattern", self.pattern, "must be n:m, n of m numbers kept", "use 2:4, or null")

    @property
    def _bits(self) -> Literal[8, 4]:
        """Of a weight that is rounded."""
        return 4 if self.method == "int4" or (self.method in ("gptq", "sparsegpt") and self.bits != 8) else 8

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How the matrices are stored afterwards; null = whole."""
        if not self.rounds:
            return None
        scale = self.scale or ("group" if self._bits == 4 else "channel")
        return QuantizationConfig(
            bits=self._bits, kind="float" if self.method == "fp8" else "int", zero=self.zero,
            group=self.group if scale == "group" else None,
            rows="int8" if self.method == "w8a8" else "float", embedding=self.embedding,
        )  # fmt: skip


DEFAULTS = {each.name: each.default for each in fields(CompressConfig)}
