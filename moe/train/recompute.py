"""Activation checkpointing: memory for time, without other numbers (Chen et al. 1604.06174).

What the backward pass computes again instead of keeping it:

    none        nothing
    selective   the inside of feed-forward networks and expert stacks: products, activations, dropout. Kept are
                attention, norms, routing, and the rows that go into an expert stack and come out: nothing is exchanged
                again.
    full        every block, from its input and its router's decision. A MoE layer whose experts are spread over ranks
                exchanges again expert counts, rows there and back, and the keys of expert dropout; all ranks do, in
                the same order, for each recomputes a block as soon as its backward pass begins.

The decision of a router, and the sums over ranks that its losses used, are kept in every case: nothing routes twice.
The recomputation ends as soon as it has what the backward pass needs.
"""

from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..layers.experts import Experts
from ..layers.ffn import FeedForward
from ..models.decoder import Decoder
from ..routing.recompute import keep_routing


def recompute(model: Decoder, what: Literal["none", "selective", "full"]) -> None:
    """Have `model` compute `what` again in its backward pass, in place. Without gradients nothing changes."""
    if what == "full":
        for block in model.all_blocks:
            _again(block, "compute", context_fn=keep_routing)
    if what == "selective":
        for module in model.modules():
            if isinstance(module, FeedForward | Experts):
                _again(module, "forward")
            if isinstance(module, Experts):
                _again(module, "mix")


def _again(module: nn.Module, method: str, **options: Any) -> None:
    """Checkpoint one method. No state of random generators is kept: every draw is keyed by its token and step."""
    again = partial(checkpoint, getattr(module, method), use_reentrant=False, preserve_rng_state=False, **options)
    setattr(module, method, again)
