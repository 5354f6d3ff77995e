"""The manifest: what a checkpoint holds, where every slice lies in its global tensor, and the sha256 of every file.

It is canonical JSON with its own sha256 inside, so a changed bit in it is seen as well. No torch here.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ... import CheckpointError
from ...configs.typed import build

FORMAT, VERSION = "turnout-checkpoint", 1
NAME = "manifest.json"
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")


class DamageError(CheckpointError):
    """The checkpoint is not what was written: it goes to quarantine and an older one is taken."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file's size and digest."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A block of a global tensor: it begins at `offset`, has `shape`, and lies in `file`."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A global tensor, tiled exactly by its slices. `dtype` is safetensors' name (`F32`)."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its numbers. `meta` is the caller's: plain JSON types."""

    step: int
    layout: dict[str, int]
    meta: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes, digest included.

    Raises:
        TypeError, ValueError: `meta` holds something that JSON does not (a NaN, an object).
    """
    return _seal({"format": FORMAT, "version": VERSION, **asdict(manifest)})


def decode(raw: bytes, where: str) -> Manifest:
    """Read what `encode` wrote; any other bytes are refused.

    Raises:
        DamageError: not a manifest, or changed since it was written (both digests named).
        CheckpointError: written by a version that this one can not read.
    """
    try:
        data = json.loads(raw)
        written = data.pop("sha256")
        sealed = _seal(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{where} is not a manifest ({error!r}): use an earlier checkpoint") from error
    if sealed != raw:
        found = hashlib.sha256(_body(data)).hexdigest()
        raise DamageError(f"{where} has changed (sha256 {found}, written {written}): use an earlier checkpoint")
    if (data.pop("format", None), data.pop("version", None)) != (FORMAT, VERSION):
        raise CheckpointError(f"{where} is not of {FORMAT} version {VERSION}: read it with the Turnout that wrote it")
    try:
        files = {name: build(FileEntry, entry, name) for name, entry in data.pop("files").items()}
        tensors = {name: build(TensorEntry, entry, name) for name, entry in data.pop("tensors").items()}
        return Manifest(files=files, tensors=tensors, **data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{where} lacks what a manifest holds ({error!r}): use an earlier checkpoint") from error


def merge(reports: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, TensorEntry]:
    """What each rank holds, by rank → the global tensors. A block that several ranks hold belongs to the lowest.

    Args:
        reports: by rank, tensor name → {dtype, shape (global), offset, local (shape)}.

    Raises:
        CheckpointError: ranks disagree about a tensor, or its blocks leave holes or overlap.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    blocks: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], Slice]] = {}
    for rank, report in enumerate(reports):
        for name, held in report.items():
            kind = (held["dtype"], tuple(held["shape"]))
            if kinds.setdefault(name, kind) != kind:
                raise CheckpointError(f"{name} is {kinds[name]} on one rank and {kind} on rank {rank}: make them agree")
            place = (tuple(held["offset"]), tuple(held["local"]))
            mine = blocks.setdefault(name, {})
            if place not in mine and math.prod(place[1]):
                mine[place] = Slice(file=rank_file(rank), offset=place[0], shape=place[1])
    tensors = {
        name: TensorEntry(dtype=kinds[name][0], shape=kinds[name][1], slices=tuple(blocks[name].values()))
        for name in sorted(kinds)
    }
    for name, entry in tensors.items():
        check_tiling(name, entry)
    return tensors


def check_tiling(name: str, entry: TensorEntry) -> None:
    """Every element of the global tensor lies in exactly one slice.

    Raises:
        CheckpointError: a slice leaves the tensor, two overlap, or elements are missing.
    """
    for i, one in enumerate(entry.slices):
        if (
            not len(one.offset) == len(one.shape) == len(entry.shape)
            or overlap(one.offset, one.shape, (0,) * len(entry.shape), entry.shape) != one.shape
        ):
            raise CheckpointError(
                f"{name} (slice at {one.offset}, shape {one.shape}) must lie in {entry.shape}: correct its ShardSpec"
            )
        for other in entry.slices[:i]:
            if math.prod(overlap(one.offset, one.shape, other.offset, other.shape)):
                raise CheckpointError(
                    f"{name} (slices at {other.offset} and {one.offset}) must not overlap: correct the ShardSpecs"
                )
    held, whole = sum(math.prod(s.shape) for s in entry.slices), math.prod(entry.shape)
    if held != whole:
        raise CheckpointError(f"{name} ({held} elements on all ranks) must have {whole}: correct the ShardSpecs")


def overlap(
    offset: Sequence[int], shape: Sequence[int], other_offset: Sequence[int], other_shape: Sequence[int]
) -> tuple[int, ...]:
    """The shape of two blocks' intersection; some dimension is 0 when they do not meet."""
    return tuple(
        max(0, min(a + n, b + m) - max(a, b))
        for a, n, b, m in zip(offset, shape, other_offset, other_shape, strict=True)
    )


def rank_file(rank: int) -> str:
    """The name of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def _body(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, indent=1, allow_nan=False).encode()


def _seal(data: Mapping[str, Any]) -> bytes:
    return _body({**data, "sha256": hashlib.sha256(_body(data)).hexdigest()}) + b"\n"
