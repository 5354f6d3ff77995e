"""Load: verify first, parse then, and read only the bytes that this rank needs, whatever layout wrote them."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import CheckpointError
from .. import process
from ..shard import ShardSpec
from .agree import on_first, together
from .disk import sha256_of
from .manifest import NAME, RANK_FILE, DamageError, Manifest, TensorEntry, check_tiling, decode, overlap
from .tensors import DTYPES, NAMES
from .writer import STEP, committed

Verify = Literal["full", "size"]
EARLIER = "use an earlier checkpoint"
WARD = "quarantine"


class Checkpoint:
    """A verified checkpoint. Get one from `open_checkpoint` or `latest`.

    Attributes:
        path: its directory.
        step, layout, meta: as saved.
        seconds: how long its verification took.
    """

    def __init__(self, path: Path, manifest: Manifest, readers: Mapping[str, Any], seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.step, self.layout, self.meta = manifest.step, manifest.layout, manifest.meta
        self._tensors, self._readers = manifest.tensors, readers

    def names(self, prefix: str = "") -> list[str]:
        """The global tensors whose names begin with `prefix`, sorted."""
        return sorted(name for name in self._tensors if name.startswith(prefix))

    def entry(self, name: str) -> TensorEntry:
        """Global shape, dtype and slices of one tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{name} is not in {self.path}: it does not belong to this model")
        return self._tensors[name]

    def read(self, name: str, spec: ShardSpec, local_shape: Sequence[int]) -> Tensor:
        """The block of `local_shape` at `spec.offset` of a global tensor, on the CPU, in the saved dtype.

        Raises:
            CheckpointError: no such tensor, another global shape, or a block outside it.
        """
        entry, local = self.entry(name), tuple(local_shape)
        if entry.shape != tuple(spec.global_shape):
            raise CheckpointError(
                f"{name} {tuple(spec.global_shape)} is {entry.shape} in {self.path}: use the config that saved it"
            )
        if overlap(spec.offset, local, (0,) * len(entry.shape), entry.shape) != local:
            raise CheckpointError(
                f"{name} (block at {spec.offset}, shape {local}) must lie in {entry.shape}: correct it"
            )
        out = torch.empty(local, dtype=DTYPES[entry.dtype])
        for part in entry.slices:
            common = overlap(spec.offset, local, part.offset, part.shape)
            if all(common):
                begin = [max(a, b) for a, b in zip(spec.offset, part.offset, strict=True)]
                source = tuple(slice(b - o, b - o + n) for b, o, n in zip(begin, part.offset, common, strict=True))
                target = tuple(slice(b - o, b - o + n) for b, o, n in zip(begin, spec.offset, common, strict=True))
                reader = self._readers[part.file]
                out[target] = reader.get_slice(name)[source] if source else reader.get_tensor(name)
        return out

    def read_all(self, name: str) -> Tensor:
        """A whole global tensor, on the CPU."""
        shape = self.entry(name).shape
        return self.read(name, ShardSpec(shape, (0,) * len(shape)), shape)


def open_checkpoint(path: str | Path, verify: Verify = "full") -> Checkpoint:
    """Verify a checkpoint directory and open it; not collective.

    Args:
        path: a committed `step-*` directory.
        verify: `full` compares every file's sha256, `size` only the sizes (and, as always, manifest and headers).

    Raises:
        CheckpointError: it is not exactly what was written; the message names the file and both digests or sizes.
    """
    start, path = time.monotonic(), Path(path)
    try:
        manifest = decode((path / NAME).read_bytes(), str(path / NAME))
        _verify_files(path, manifest, verify)
        readers = {name: safe_open(path / name, framework="pt") for name in manifest.files}
        _verify_headers(path, manifest, readers)
    except (OSError, SafetensorError) as error:
        raise DamageError(f"{path} can not be read ({error}): {EARLIER}") from error
    return Checkpoint(path, manifest, readers, time.monotonic() - start)


def latest(root: str | Path, verify: Verify = "full") -> Checkpoint | None:
    """The newest checkpoint under `root` that verifies; None when none was ever committed; collective.

    Rank 0 verifies (`verify`), and moves what does not verify to `quarantine/` with a `reason.txt`; the other ranks
    then open the same one, comparing sizes.

    Raises:
        CheckpointError: there were checkpoints, but none verifies, now or before; or a rank can not open it.
    """
    opened: list[Checkpoint] = []

    def pick() -> str | None:
        reasons = []
        for _, path in reversed(committed(Path(root))):
            try:
                opened.append(open_checkpoint(path, verify))
                return path.name
            except DamageError as error:
                reasons.append(f"{_quarantine(path, str(error))}: {error}")
        if reasons:
            raise CheckpointError(f"no checkpoint in {root} verifies; all moved away: {'; '.join(reasons)}")
        if ward := sorted((Path(root) / WARD).glob("*")):
            raise CheckpointError(
                f"every checkpoint of {root} is damaged: see {ward[-1]}, remove {WARD}/ to begin anew"
            )
        return None

    def follow() -> None:
        if name is not None and not opened:
            opened.append(open_checkpoint(Path(root) / name, "size"))

    name = on_first(pick)
    together(follow)
    return opened[0] if opened else None


@torch.no_grad()
def restore(checkpoint: Checkpoint, tensors: Mapping[str, tuple[Tensor, ShardSpec]], prefix: str = "") -> None:
    """Fill every tensor in place from the checkpoint's global tensors of the same names; collective.

    Nothing is written unless everything fits: the names under `prefix` are exactly those that the ranks hold together,
    and each has the saved global shape and dtype.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshaped or of another dtype; on every rank.
    """

    def fits() -> None:
        for name, (tensor, spec) in tensors.items():
            entry = checkpoint.entry(name)
            wanted = (NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(spec.global_shape))
            if wanted != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"{name} {wanted} is {(entry.dtype, entry.shape)} in {checkpoint.path}: "
                    "use the configuration that saved it"
                )

    together(fits)
    held = {name for names in process.gather_json(sorted(tensors)) for name in names}
    unexpected = [name for name in checkpoint.names(prefix) if name not in held]
    if unexpected:
        raise CheckpointError(
            f"{unexpected[0]} ({len(unexpected)} in all) in {checkpoint.path} has no place in this model: "
            "use the configuration that saved it"
        )
    for name, (tensor, spec) in tensors.items():
        tensor.copy_(checkpoint.read(name, spec, tensor.shape))


def _verify_files(path: Path, manifest: Manifest, verify: Verify) -> None:
    numbered = STEP.fullmatch(path.name)
    if numbered and int(numbered[1]) != manifest.step:
        raise DamageError(f"{path} holds step {manifest.step}: it was renamed; {EARLIER}")
    present = {entry.name for entry in path.iterdir()} - {NAME}
    for kind, names in (
        ("misses", manifest.files.keys() - present),
        ("has the unexpected", present - manifest.files.keys()),
    ):
        if names:
            raise DamageError(f"{path} {kind} {', '.join(sorted(names))}: {EARLIER}")
    for name, entry in manifest.files.items():
        file = path / name
        if not RANK_FILE.fullmatch(name):
            raise DamageError(f"{file} is not a checkpoint's file name: {EARLIER}")
        if (size := file.stat().st_size) != entry.bytes:
            raise DamageError(f"{file} ({size} bytes) should have {entry.bytes}: {EARLIER}")
        if verify == "full" and (found := sha256_of(file)) != entry.sha256:
            raise DamageError(f"{file} has changed (sha256 {found}, written {entry.sha256}): {EARLIER}")


def _verify_headers(path: Path, manifest: Manifest, readers: Mapping[str, Any]) -> None:
    """The files hold exactly the slices that the manifest lists, and these tile their tensors."""
    expected: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    for name, entry in manifest.tensors.items():
        try:
            check_tiling(name, entry)
        except CheckpointError as error:
            raise DamageError(f"{path / NAME}: {error}") from error
        expected.update({(part.file, name): (entry.dtype, part.shape) for part in entry.slices})
    found = {}
    for file, reader in readers.items():
        for name in reader.keys():  # noqa: SIM118 (not a dict)
            block = reader.get_slice(name)
            found[file, name] = (block.get_dtype(), tuple(block.get_shape()))
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise DamageError(f"{path / wrong[0][0]} ({wrong[0][1]}) is not as {NAME} says: {EARLIER}")


def _quarantine(path: Path, reason: str) -> Path:
    ward = path.parent / WARD
    number, target = 0, ward / path.name
    while target.exists():
        number += 1
        target = ward / f"{path.name}-{number}"
    try:
        ward.mkdir(exist_ok=True)
        path.rename(target)
        (target / "reason.txt").write_text(reason + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} is damaged ({reason}) and can not be moved ({error}): move it away") from error
    return target
