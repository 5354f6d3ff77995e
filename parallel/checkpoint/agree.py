"""One verdict for all ranks: what fails on one rank fails on every rank, with the same words."""

from collections.abc import Callable
from typing import Any

from ... import CheckpointError
from .. import process


def together(action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and return what each returned (plain JSON types), by rank; collective.

    Raises:
        CheckpointError: it failed on some rank; every rank raises the lowest one's error.
    """
    try:
        outcome = {"value": action()}
    except (CheckpointError, OSError) as error:
        outcome = {"error": str(error)}
    outcomes = process.gather_json(outcome)
    for rank, other in enumerate(outcomes):
        if "error" in other:
            raise CheckpointError(f"rank {rank}: {other['error']}" if len(outcomes) > 1 else other["error"])
    return [other["value"] for other in outcomes]


def on_first(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 alone; every rank gets its value, or raises its `CheckpointError`."""
    return together(lambda: action() if process.rank() == 0 else None)[0]
