"""Activation checkpointing without routing twice: the decision is saved in the forward pass and recalled.

y = checkpoint(block, x, use_reentrant=False)                            # works as it is
y = checkpoint(block, x, use_reentrant=False, context_fn=keep_routing)   # the same through torch's public interface

A recomputed router would choose anew: rounding, a changed parameter or another kernel flips near-ties, and the gradient
is then that of experts which the forward pass never asked. So every checkpointed region has a tape. The forward pass
records each router's decision in order; a recomputation, however often it happens, plays it from the beginning. A
region inside a region that is being recomputed records what it is played. Where no tape can be had (reentrant
checkpointing), recomputation is an error, never a second choice.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _autograd

from ... import ConfigError
from .record import Decision

if TYPE_CHECKING:
    from .router import Router

Tape = list[tuple["Router", Decision]]


@dataclass
class _Recording:
    tape: Tape


@dataclass
class _Playing:
    rest: Iterator[tuple["Router", Decision]]


class _Regions(threading.local):
    """The checkpointed regions that this thread is in, innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Recording | _Playing] = []


_regions = _Regions()


@dataclass
class _Region:
    """A context that may be entered many times; each time `enter` gives a fresh state."""

    enter: Callable[[], _Recording | _Playing]

    def __enter__(self) -> None:
        _regions.stack.append(self.enter())

    def __exit__(self, *error: object) -> None:
        _regions.stack.pop()


def keep_routing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: routing is saved, not redone.

    Returns the contexts of the forward pass and of its recomputation.
    """
    tape: Tape = []
    return _Region(lambda: _Recording(tape)), _Region(lambda: _Playing(iter(tape)))


def recall(router: "Router") -> Decision | None:
    """The decision that the forward pass being recomputed made here; None when nothing is being recomputed.

    Raises:
        ConfigError: this is a recomputation and the decision was not kept, or it calls other routers than the forward.
    """
    playing = next((region for region in reversed(_regions.stack) if isinstance(region, _Playing)), None)
    if playing is None:
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            raise ConfigError(
                f"activation checkpointing around the MoE layer {router.layer} (its forward pass runs again inside "
                "backward) must keep the routing: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False, "
                "context_fn=turnout.moe.keep_routing)"
            )
        return None
    owner, decision = next(playing.rest, (None, None))
    if owner is not router or decision is None:
        raise ConfigError(
            f"the recomputation of MoE layer {router.layer} (a checkpointed function) must call the routers that its "
            "forward pass called, in the same order: remove the condition that differs between the two"
        )
    remember(router, decision)
    return decision


def remember(router: "Router", decision: Decision) -> None:
    """Keep a decision for the recomputation of this forward pass, if there will be one."""
    for region in reversed(_regions.stack):
        if isinstance(region, _Playing):
            break
        region.tape.append((router, decision))
    for frame in _frames():
        if not isinstance(frame.recompute_fn, _Played):
            frame.recompute_fn = _Played(frame.recompute_fn)
        frame.recompute_fn.tape.append((router, decision))


@dataclass
class _Played:
    """The recomputation of a region that has no `context_fn` of ours, with its tape."""

    recompute: Callable[..., Any]
    tape: Tape = field(default_factory=list)

    def __call__(self, *args: Any) -> None:
        with _Region(lambda: _Playing(iter(self.tape))):
            self.recompute(*args)


def _frames() -> list[Any]:
    """The non-reentrant checkpoints that this forward pass is in, innermost first, up to one being recomputed.

    torch has no public way to ask. It marks a region by hooks on saved tensors, whose pack hook holds the region's
    `frame`; during a recomputation it holds a `target_frame_ref` instead. Hooks of another kind are passed over.
    """
    hooks, frames = [], []
    while hook := _autograd._top_saved_tensors_default_hooks(False):
        held = _held(hook[0])
        if "target_frame_ref" in held:
            break
        if hasattr(held.get("frame"), "recompute_fn"):
            frames.append(held["frame"])
        _autograd._pop_saved_tensors_default_hooks()
        hooks.append(hook)
    for pack, unpack in reversed(hooks):
        _autograd._push_saved_tensors_default_hooks(pack, unpack)
    return frames


def _held(function: Any) -> dict[str, Any]:
    """What a function's closure holds, by name."""
    names, cells = getattr(getattr(function, "__code__", None), "co_freevars", ()), getattr(function, "__closure__", ())
    return {name: cell.cell_contents for name, cell in zip(names, cells or (), strict=False)}
