"""One operation at one shape, as it is measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Arguments = Sequence[tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation at a shape.

    Args:
        op: its name.
        shape: in words.
        size, flops: bytes and FLOPs that it needs at least.
        make: gives the arguments of one call and those of the next; calls take them in turns.
        keywords: that every call has.
    """

    op: str
    shape: str
    size: float
    flops: float
    make: Callable[[], Arguments]
    keywords: Mapping[str, Any] = field(default_factory=dict)
