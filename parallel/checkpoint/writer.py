"""Save: every rank writes its own file aside, and one rename makes the checkpoint.

    tmp-<step>-<nonce>/    rank 0 makes it
    rank-00000.safetensors ... each rank writes, fsyncs, and reports (bytes, sha256)
    manifest.json          rank 0 writes and fsyncs it
    step-%08d/             the rename; the parent is fsynced; only now is it saved

A process that dies anywhere before the rename leaves the earlier checkpoints as they were.
"""

import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import CheckpointError
from .. import process
from ..mesh import Mesh
from ..shard import ShardSpec
from .agree import on_first, together
from .disk import Disk
from .manifest import NAME, FileEntry, Manifest, TensorEntry, encode, merge, rank_file
from .tensors import NAMES, header, stream

STEP = re.compile(r"step-(\d{8,})")
DISK = Disk()
BETWEEN_VOTES = 0.2  # seconds between two rounds of waiting for the ranks that still write


class Save:
    """A checkpoint on its way: begun by all ranks, written by each in a thread of its own, committed by all.

        save = Save(root, step, tensors, meta, mesh, snapshot=True)     # collective, at a step boundary
        while not save.written: ...                                     # train on
        save.wait(); path = save.commit(); save.retain()                # collective

    The thread writes, hashes and fsyncs this rank's file; it takes part in no collective. What it can not write is told
    by `commit`, on every rank. As long as its directory is not committed, nothing counts as saved.

    Args:
        root, step, tensors, meta, mesh, disk: as `save` takes them.
        snapshot: copy what this rank writes first, to host memory, so that the tensors may change from now on. Else
            they must stay as they are until `wait` returns.

    Raises:
        CheckpointError: on every rank; earlier checkpoints are intact.
    """

    def __init__(
        self,
        root: str | Path,
        step: int,
        tensors: Mapping[str, tuple[Tensor, ShardSpec]],
        meta: Mapping[str, Any],
        mesh: Mesh,
        *,
        disk: Disk,
        snapshot: bool = False,
    ) -> None:
        self.root, self.step, self.meta, self.mesh, self.disk = Path(root), step, dict(meta), mesh, disk
        self.final = self.root / f"step-{step:08d}"
        self.entries = merge(process.gather_json(_report(tensors)))
        self.aside = self.root / on_first(lambda: _begin(self.root, self.final, disk))
        mine = {name: tensors[name][0] for name in _owned(self.entries, mesh.rank)}
        try:
            together(lambda: _check_types(mine))
            self._mine = mine
            if snapshot:
                together(self._copy)
        except CheckpointError:
            self._abandon()
            raise
        self._file: dict[str, Any] | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name=self.aside.name, daemon=True)
        self._thread.start()

    @property
    def written(self) -> bool:
        """Whether this rank's thread has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until every rank's thread has ended. Collective, again and again: a slow disk is waited for, and a peer that
        is lost meanwhile is noticed.

        Raises:
            PeerError: a peer died or hangs.
        """
        while float(process.all_sum(torch.tensor([float(not self.written)]), "vote on a save")):
            self._thread.join(BETWEEN_VOTES)

    def commit(self) -> Path:
        """Make it a checkpoint, after `wait`; on return it is saved, on every rank's word. Collective.

        Raises:
            CheckpointError: some rank could not write its file, or rank 0 the manifest; nothing of it is left.
        """
        try:
            files = together(self._outcome)
            manifest = Manifest(
                step=self.step,
                layout={"world": self.mesh.world, **asdict(self.mesh.layout)},
                meta=self.meta,
                files={rank_file(rank): FileEntry(**file) for rank, file in enumerate(files) if file},
                tensors=self.entries,
            )
            on_first(lambda: _commit(manifest, self.aside, self.final, self.disk))
        except CheckpointError:
            self._abandon()
            raise
        return self.final

    def retain(self, keep: int | None, in_use: Path | None = None) -> None:
        """Remove what dead saves left, and all but the last `keep` checkpoints, this one and `in_use`. Collective.

        Raises:
            CheckpointError: one can not be removed; this one is saved nevertheless.
        """
        on_first(lambda: _retain(self.root, keep, {self.final, in_use}, self.disk))

    def _copy(self) -> None:
        try:
            self._mine = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._mine.items()}
        except (RuntimeError, MemoryError) as error:
            size = sum(tensor.nbytes for tensor in self._mine.values())
            raise CheckpointError(
                f"{self.final} can not be copied to host memory ({size} bytes: {error}): use train.async_save=false"
            ) from error

    def _write(self) -> None:
        """This rank's file, if anything belongs to it; runs in the thread."""
        try:
            if self._mine:
                head = header(self._mine)
                needed = len(head) + sum(tensor.nbytes for tensor in self._mine.values())
                path = self.aside / rank_file(self.mesh.rank)
                size, sha256 = self.disk.write(path, stream(self._mine, head), needed)
                self._file = asdict(FileEntry(bytes=size, sha256=sha256))
        except Exception as error:  # noqa: BLE001  (a thread must not end without a word: `commit` raises it)
            self._error = error
        self._mine = {}

    def _outcome(self) -> dict[str, Any] | None:
        self._thread.join()
        if isinstance(self._error, CheckpointError | OSError):
            raise self._error
        if self._error is not None:
            raise CheckpointError(f"{self.aside} can not be written ({self._error!r}): see the log") from self._error
        return self._file

    def _abandon(self) -> None:
        if self.mesh.rank == 0:
            shutil.rmtree(self.aside, ignore_errors=True)


def save(
    root: str | Path,
    step: int,
    tensors: Mapping[str, tuple[Tensor, ShardSpec]],
    meta: Mapping[str, Any],
    mesh: Mesh,
    keep: int | None = 2,
    in_use: Path | None = None,
    disk: Disk = DISK,
) -> Path:
    """Write the checkpoint of `step`; collective. On return it is saved, on every rank's word.

    Args:
        root: the run's `checkpoints/`, the same directory for every rank.
        step: names the checkpoint; a committed one is never overwritten.
        tensors: name → (this rank's part, where it lies in the global tensor). What several ranks hold is written once.
        meta: plain JSON types, rank 0's are taken.
        mesh: the layout, recorded; any other layout can read the checkpoint.
        keep: how many committed checkpoints to keep, None = all.
        in_use: a checkpoint that must stay.
        disk: the disk operations.

    Raises:
        CheckpointError: on every rank; earlier checkpoints are intact.
    """
    under_way = Save(root, step, tensors, meta, mesh, disk=disk)
    under_way.wait()
    final = under_way.commit()
    under_way.retain(keep, in_use)
    return final


def committed(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of everything named like a committed checkpoint, oldest first."""
    if not root.is_dir():
        return []
    found = ((STEP.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def _report(tensors: Mapping[str, tuple[Tensor, ShardSpec]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "dtype": NAMES.get(tensor.dtype, str(tensor.dtype)),
            "shape": spec.global_shape,
            "offset": spec.offset,
            "local": tuple(tensor.shape),
        }
        for name, (tensor, spec) in tensors.items()
    }


def _begin(root: Path, final: Path, disk: Disk) -> str:
    if final.exists():
        raise CheckpointError(f"{final} is already saved and is never overwritten: choose another step or directory")
    aside = root / f"tmp-{final.name.removeprefix('step-')}-{uuid.uuid4().hex[:12]}"
    disk.make_directory(aside)
    return aside.name


def _owned(entries: Mapping[str, TensorEntry], rank: int) -> list[str]:
    """The tensors of which `rank` writes a slice."""
    file = rank_file(rank)
    return [name for name, entry in entries.items() if any(part.file == file for part in entry.slices)]


def _check_types(tensors: Mapping[str, Tensor]) -> None:
    unknown = sorted(f"{key} ({tensor.dtype})" for key, tensor in tensors.items() if tensor.dtype not in NAMES)
    if unknown:
        raise CheckpointError(f"{unknown[0]} must have one of the types {', '.join(NAMES.values())}: convert it")


def _commit(manifest: Manifest, aside: Path, final: Path, disk: Disk) -> None:
    try:
        raw = encode(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta does not fit JSON ({error}): give plain, finite values") from error
    disk.write(aside / NAME, [raw], len(raw))
    if final.exists():
        raise CheckpointError(f"{final} appeared during the save and is never overwritten: is another run writing?")
    disk.publish(aside, final)


def _retain(root: Path, keep: int | None, needed: set[Path | None], disk: Disk) -> None:
    """Remove what dead saves left, and all but the last `keep` committed checkpoints and the `needed` ones."""
    for path in root.glob("tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    if keep is None:
        return
    for _, path in committed(root)[: -max(keep, 1)]:
        if path not in needed:
            disk.remove(path, root / f"tmp-drop-{path.name}")
