"""The vocabulary in which a model says how its parameters may be spread over ranks.

A model's `plan()` maps name patterns (as in file names: `blocks.*.ffn.experts.*`) to placements:

    replicate   every rank holds the whole tensor (also what no pattern names)
    expert      the first dimension is the expert; each rank holds its experts
    column      [out, in] or [out]: each tensor-parallel rank holds its output features
    gated       column, where the first half of the output features are gates and the second what they gate: each rank
                holds the same part of both
    row         [out, in]: each tensor-parallel rank holds its input features; of a rounded matrix its output features
    vocab       the vocabulary; whole on every rank, for tensor-parallel ranks share out the tokens of the head and the
                loss instead: as few FLOPs, and nothing to exchange

A module that owns matrices under `column`, `gated` or `row` is a layer that tensor-parallel ranks compute together
(parallel/tensor.py).
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from .. import ConfigError

Placement = Literal["replicate", "expert", "column", "gated", "row", "vocab"]


def match(plan: Mapping[str, str], name: str) -> Placement:
    """The placement of parameter `name`: the first pattern that fits, else "replicate".

    Raises:
        ConfigError: the pattern's placement is not in the vocabulary.
    """
    for pattern, placement in plan.items():
        if fnmatchcase(name, pattern):
            if placement not in get_args(Placement):
                known = ", ".join(get_args(Placement))
                raise ConfigError(f"plan[{pattern!r}] ({placement}) must be a known placement: use one of {known}")
            return cast(Placement, placement)
    return "replicate"
