"""Compress a model block by block: no more than one block, the two ends and the windows' hidden states are in memory.

Two streams read held-out text, one through the whole model and one through the compressed: the same pass that makes the
model says what it costs. T tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import CheckpointError
from ..config import ModelConfig
from ..eval.agreement import agreement
from ..families.reading import ForeignSource, OwnSource
from ..layers.block import Block
from ..layers.moe import MoE
from ..layers.quantized import round_to
from ..models.decoder import Decoder
from .config import CompressConfig
from .methods import Method
from .partial import Partial
from .routed import Routed, noting
from .stream import Stream
from .watch import Met, watching


@dataclass
class Streams:
    """The texts: what calibrates, and what is measured through the model as it was and as it becomes.

    Attributes:
        calibration: through the compressed blocks; None where the method needs none.
        before: held-out text through the whole model; after: the same through the compressed one.
    """

    calibration: Stream | None
    before: Stream
    after: Stream

    def states(self) -> dict[str, Tensor]:
        """All hidden states by name."""
        return {f"{name}.{i}": x for name, one in self._named() for i, x in enumerate(one.states)}

    def load(self, states: Mapping[str, Tensor]) -> None:
        """Go on from `states`."""
        for name, one in self._named():
            one.states = [states[f"{name}.{i}"].clone() for i in range(len(one.parts))]

    def _named(self) -> list[tuple[str, Stream]]:
        named = [("calibration", self.calibration), ("before", self.before), ("after", self.after)]
        return [(name, one) for name, one in named if one is not None]


@torch.no_grad()
def walk(
    source: OwnSource | ForeignSource,
    how: CompressConfig,
    streams: Streams,
    partial: Partial,
    tell: Callable[[int, Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Compress every block that is not done yet.

    Args:
        source: the whole model.
        how: what is done.
        streams: the texts.
        partial: where blocks go.
        tell: is told the index and the notes of each block that is done.

    Returns:
        nats a token `before` and `after`.

    Raises:
        CheckpointError: a weight that is not finite, by name.
    """
    method = Method.of(how, source.cfg, lambda index: _block(source, index))
    whole = _ends(source, source.cfg)
    ends = _rounded_ends(source, method.target, whole)
    if partial.done:
        streams.load(partial.states())
    else:
        partial.put_ends({name: _typed(source, name, tensor) for name, tensor in ends.state_dict().items()})
        for stream, model in ((streams.calibration, ends), (streams.before, whole), (streams.after, ends)):
            if stream is not None:
                stream.enter(model.embed)
    for index in range(partial.done, source.cfg.layers):
        notes = _step(source, index, method, streams, partial)
        tell(index, notes)
    return {"before": streams.before.loss(whole.finish), "after": streams.after.loss(ends.finish)}


def _step(
    source: OwnSource | ForeignSource, index: int, method: Method, streams: Streams, partial: Partial
) -> dict[str, Any]:
    """One block."""
    block = _block(source, index)
    streams.before.through(block)
    if index not in method.kept:
        partial.put(None, streams.states(), {"gone": True})
        return partial.notes[-1]
    notes = method.apply(block, *_watch(block, method.how, streams.calibration))
    block.eval()
    for name, tensor in block.state_dict().items():  # as it will be stored, so that what is measured is what is written
        tensor.copy_(_typed(source, f"blocks.{index}.{name}", tensor))
    for stream in (streams.calibration, streams.after):
        if stream is not None:
            stream.through(block)
    if index in source.cfg.moe_layers and not method.how.routed:
        valid = [part.valid_T for part in streams.before.parts]
        notes["agreement"] = agreement(streams.after.routings(index), streams.before.routings(index), valid)
    stored = {name: _typed(source, f"blocks.{index}.{name}", tensor) for name, tensor in block.state_dict().items()}
    partial.put(stored, streams.states(), notes)
    return notes


def _watch(block: Block, how: CompressConfig, stream: Stream | None) -> tuple[Met, list[Routed]]:
    """What the block meets in calibration, and where its tokens go."""
    if stream is None or (how.routed and not isinstance(block.ffn, MoE)):
        return {}, []
    if isinstance(block.ffn, MoE) and how.routed:
        with noting(block.ffn) as routed:
            stream.show(block)
        return {}, routed
    with watching(block, how.moments) as met:
        stream.show(block)
    return met, []


def _block(source: OwnSource | ForeignSource, index: int) -> Block:
    with torch.device("meta"):
        block = Block(source.cfg, index)
    block.load_state_dict({name: _read(source, f"blocks.{index}.{name}") for name in block.state_dict()}, assign=True)
    return block.eval().requires_grad_(False)


def _ends(source: OwnSource | ForeignSource, cfg: ModelConfig) -> Decoder:
    """The model without its blocks."""
    with torch.device("meta"):
        model = Decoder(cfg)
    del model.blocks
    model.load_state_dict({name: _read(source, name) for name in model.state_dict()}, assign=True)
    model.tell_dtype()
    return model.eval().requires_grad_(False)


def _rounded_ends(source: OwnSource | ForeignSource, cfg: ModelConfig, whole: Decoder) -> Decoder:
    """The compressed model without its blocks: `whole` itself where its ends are not rounded."""
    own = cfg.quantization
    if own is None or not own.embedding:
        return whole
    with torch.device("meta"):
        model = Decoder(cfg)
    del model.blocks
    state = {}
    for name in model.state_dict():
        end, _, part = name.rpartition(".")
        if end in ("embed", "head"):
            state[name] = getattr(round_to(_read(source, f"{end}.weight"), own.of_vocabulary), part)
        else:
            state[name] = _read(source, name)
    model.load_state_dict(state, assign=True)
    model.tell_dtype()
    return model.eval().requires_grad_(False)


def _read(source: OwnSource | ForeignSource, name: str) -> Tensor:
    tensor = source.read(name)
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{name} has numbers that are not finite: nothing can be rounded or pruned by them")
    return tensor.clone()  # what is read may lie in a mapped file


def _typed(source: OwnSource | ForeignSource, name: str, tensor: Tensor) -> Tensor:
    """As the source stores it; what the compressed model has beside stays as it is."""
    return tensor.to(source.dtype(name, None)) if name in source.shapes() else tensor
