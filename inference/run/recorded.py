"""Decode steps of few rows as recordings: one call in place of a forward pass from Python.

The second step of a number of rows is recorded while it runs, the third is computed both ways and compared, bit for
bit; from then on steps of that size are played. What can not be recorded, or differs, stays as it is.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...kernels.cpp.build import library
from ...kernels.cpp.record import Arena, Recorder, Recording
from ...kernels.registry import asked
from .batch import Batch
from .graphs import Buffers, decodes

LOG = logging.getLogger(__name__)
ROWS = 16
"""Larger steps spend their time in the kernels."""
KEPT = 32


@dataclass(frozen=True)
class _Recorded:
    """A step, its inputs and its result."""

    buffers: Buffers
    recording: Recording
    logits_RV: Tensor

    def play(self, batch: Batch) -> Tensor:
        """Float32 logits, which are the caller's."""
        self.buffers.fill(batch)
        self.recording.play()
        return self.logits_RV.to(torch.float32, copy=True)


@dataclass
class _Entry:
    """Steps of one kind."""

    steps: int = 0
    recorded: _Recorded | None = None
    proven: bool = False


@dataclass
class RecordedSteps:
    """The recordings of one model's decode steps.

    Args:
        model: its parameters are read where they lie; when one was replaced all recordings are forgotten. It is looked
            at whenever other requests run than in the step before.
        width: blocks of the longest sequence.
        sums: what a step adds to besides its result, once however often it is computed.
    """

    model: nn.Module
    width: int
    sums: Tensor
    entries: OrderedDict[tuple[object, ...], _Entry] = field(default_factory=OrderedDict)
    _arena: Arena = field(default_factory=Arena)
    _state: "_State | None" = None
    _heard: bool = False
    _requests: list[str] = field(default_factory=list)

    def fits(self, batch: Batch) -> bool:
        """Whether a step like this may be recorded."""
        known = batch.memory is None and batch.valid_T is None and batch.block_tables_BM.shape[1] <= self.width
        return known and batch.tokens_T.numel() <= ROWS and decodes(batch) and library() is not None

    def run(self, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        """`compute(batch)`: float32 logits of every row, played if they are recorded."""
        requests = [item.request.id for item in batch.sampling]
        if requests != self._requests:
            self._look()
            self._requests = requests
        if self._heard:
            return compute(batch).float()
        entry = self._entry(batch)
        entry.steps += 1
        if entry.recorded is None:
            return self._record(entry, batch, compute) if entry.steps == 2 else compute(batch).float()
        return entry.recorded.play(batch) if entry.proven else self._prove(entry, entry.recorded, batch, compute)

    def _entry(self, batch: Batch) -> _Entry:
        kind = batch.tokens_T.numel(), torch.get_num_threads(), asked()
        entry = self.entries.setdefault(kind, _Entry())
        self.entries.move_to_end(kind)
        if len(self.entries) > KEPT:
            self.entries.popitem(last=False)
        return entry

    def _record(self, entry: _Entry, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        buffers = Buffers.of(batch.tokens_T.numel(), self.width, batch.tokens_T.device)
        buffers.fill(batch)
        batch = buffers.over(batch)
        with Recorder(self._arena) as recorder:
            logits_RV = compute(batch)
        found = recorder.recording
        if found.void is None:
            entry.recorded = _Recorded(buffers, found, logits_RV)
        else:
            LOG.debug("decode steps of %d rows can not be recorded: %s", len(batch.tokens_T), found.void)
        return logits_RV.to(torch.float32, copy=True)

    def _prove(self, entry: _Entry, recorded: _Recorded, batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
        before = self.sums.clone()
        played_RV, after = recorded.play(batch), self.sums.clone()
        self.sums.copy_(before)
        logits_RV = compute(batch).float()
        entry.proven = all(
            torch.equal(_bits(ours), _bits(theirs)) for ours, theirs in ((played_RV, logits_RV), (after, self.sums))
        )
        if not entry.proven:
            LOG.warning("a recorded decode step of %d rows gave other numbers: it is not used", len(batch.tokens_T))
            entry.recorded = None
        return logits_RV

    def _look(self) -> None:
        """At all weights: after some milliseconds none of them is in the cache, and this is not for every step."""
        if self._state is None or self._state.changed():
            self.entries.clear()
            self._state = _State(self.model)
        self._heard = self._state.heard


class _State:
    """Where a model's numbers lie, and who looks at its layers."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._tensors = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self._children = [m._modules for m in modules if m._modules]
        self._hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._held = [t.detach() for d in self._tensors for t in d.values() if t is not None]  # their memory stays
        self._found = self._look()

    @property
    def heard(self) -> bool:
        """Somebody listens to a layer, or changes what it gives."""
        return any(self._hooks)

    def changed(self) -> bool:
        return self._look() != self._found

    def _look(self) -> tuple[list[int], list[nn.Module | None]]:
        places = [t.data_ptr() for d in self._tensors for t in d.values() if t is not None]
        return places, [m for d in self._children for m in d.values()]


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)
