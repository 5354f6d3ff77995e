"""Save: every rank writes its own file aside, and one rename makes the checkpoint.

    tmp-<step>-<nonce>/    rank 0 makes it
    rank-00000.safetensors ... each rank writes, fsyncs, and reports (bytes, sha256)
    manifest.json          rank 0 writes and fsyncs it
    step-%08d/             the rename; the parent is fsynced; only now is it saved

A process that dies anywhere before the rename leaves the earlier checkpoints as they were.
"""

import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import CheckpointError
from .. import process
from ..mesh import Mesh
from ..shard import ShardSpec
from .agree import on_first, together
from .disk import Disk
from .manifest import NAME, FileEntry, Manifest, TensorEntry, encode, merge, rank_file
from .tensors import NAMES, stream

STEP = re.compile(r"step-(\d{8,})")
DISK = Disk()


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
    root = Path(root)
    final = root / f"step-{step:08d}"
    entries = merge(process.gather_json(_report(tensors)))
    aside = root / on_first(lambda: _begin(root, final, disk))
    try:
        files = together(lambda: _write(aside, tensors, entries, mesh.rank, disk))
        layout = {"world": mesh.world, **asdict(mesh.layout)}
        manifest = Manifest(
            step=step,
            layout=layout,
            meta=dict(meta),
            files={rank_file(rank): FileEntry(**file) for rank, file in enumerate(files) if file},
            tensors=entries,
        )
        on_first(lambda: _commit(manifest, aside, final, disk))
    except CheckpointError:
        if mesh.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    on_first(lambda: _retain(root, keep, {final, in_use}, disk))
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


def _write(
    aside: Path,
    tensors: Mapping[str, tuple[Tensor, ShardSpec]],
    entries: Mapping[str, TensorEntry],
    rank: int,
    disk: Disk,
) -> dict[str, Any] | None:
    """Write what belongs to this rank; None when nothing does."""
    name = rank_file(rank)
    mine = {key: tensors[key][0] for key, entry in entries.items() if any(s.file == name for s in entry.slices)}
    unknown = sorted(f"{key} ({tensor.dtype})" for key, tensor in mine.items() if tensor.dtype not in NAMES)
    if unknown:
        raise CheckpointError(f"{unknown[0]} must have one of the types {', '.join(NAMES.values())}: convert it")
    if not mine:
        return None
    size, sha256 = disk.write(aside / name, stream(mine))
    return asdict(FileEntry(bytes=size, sha256=sha256))


def _commit(manifest: Manifest, aside: Path, final: Path, disk: Disk) -> None:
    try:
        raw = encode(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta does not fit JSON ({error}): give plain, finite values") from error
    disk.write(aside / NAME, [raw])
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
