"""The vocabulary in which a model says how its parameters may be spread over ranks.

A model's `plan()` maps name patterns (as in file names: `blocks.*.ffn.experts.*`) to placements:

    replicate   every rank holds the whole tensor (also what no pattern names)
    expert      the first dimension is the expert; each rank holds its experts
    column      output features may be split (replicated until tensor parallelism is built)
    row         input features may be split (likewise)
    vocab       the vocabulary may be split (likewise)
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from .. import ConfigError

Placement = Literal["replicate", "expert", "column", "row", "vocab"]


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
