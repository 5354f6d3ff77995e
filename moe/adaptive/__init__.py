"""The mixture of local experts of 1991 and its three objectives, on vowels: `python -m turnout.moe.adaptive`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .experiment import Run, compare, linear_map, train
    from .mixture import AdaptiveMixture
    from .objectives import OBJECTIVES, blend, competitive, cooperative, negative_log_likelihood, posterior
    from .plots import picture
    from .specialise import Measures, measure
    from .task import VOWELS, VowelTask, vowel_task

_LAZY = {
    "AdaptiveMixture": ".mixture",
    "Measures": ".specialise",
    "OBJECTIVES": ".objectives",
    "Run": ".experiment",
    "VOWELS": ".task",
    "VowelTask": ".task",
    "blend": ".objectives",
    "compare": ".experiment",
    "competitive": ".objectives",
    "cooperative": ".objectives",
    "linear_map": ".experiment",
    "measure": ".specialise",
    "negative_log_likelihood": ".objectives",
    "picture": ".plots",
    "posterior": ".objectives",
    "train": ".experiment",
    "vowel_task": ".task",
}

__all__ = [
    "OBJECTIVES",
    "VOWELS",
    "AdaptiveMixture",
    "Measures",
    "Run",
    "VowelTask",
    "blend",
    "compare",
    "competitive",
    "cooperative",
    "linear_map",
    "measure",
    "negative_log_likelihood",
    "picture",
    "posterior",
    "train",
    "vowel_task",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
