"""A compressed model while it is made: a file a finished block, and one that says how far it is and goes on from there.

Every file is written aside and renamed, so that what is there is whole.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import CheckpointError

PLAN, STATES, ENDS = "plan.json", "states.safetensors", "ends.safetensors"


class Partial:
    """The directory beside the target.

    Args:
        target: the model directory to be.
        plan: what decides the result; what was made for another plan is thrown away.

    Attributes:
        done: finished blocks.
        notes: what was told of each.

    Raises:
        CheckpointError: it can not be written, what lies there does not read, or is something else.
    """

    def __init__(self, target: Path, plan: Mapping[str, Any]) -> None:
        self.directory = target.with_name(f"partial-{target.name}")
        self.done, self.notes = 0, list[dict[str, Any]]()
        text = json.dumps(plan, indent=1, sort_keys=True)
        strange = [file for file in self.directory.glob("*") if file.name != PLAN and file.suffix != ".safetensors"]
        if strange:
            raise CheckpointError(f"{strange[0]} is no part of a compression: move it away, or choose another DST")
        try:
            if self._read(PLAN) != text:
                shutil.rmtree(self.directory, ignore_errors=True)
                self.directory.mkdir(parents=True)
                (self.directory / PLAN).write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{self.directory} can not be written ({error}): choose another DST") from error
        if (self.directory / STATES).is_file():
            with self._open(STATES) as reader:
                found = reader.metadata()
            self.done, self.notes = int(found["done"]), json.loads(found["notes"])

    def states(self) -> dict[str, Tensor]:
        """The hidden states behind the last finished block."""
        return self._tensors(STATES) if self.done else {}

    def put_ends(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what is no block's."""
        self._save(ENDS, tensors)

    def put(self, tensors: Mapping[str, Tensor] | None, states: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a block, None of one that goes, and where everything stands behind it."""
        if tensors is not None:
            self._save(_block(self.done), tensors)
        self.notes.append(dict(notes))
        self.done += 1
        self._save(STATES, states, {"done": str(self.done), "notes": json.dumps(self.notes)})

    def tensors(self) -> dict[str, Tensor]:
        """Everything, mapped: memory is taken only by what is read."""
        found = self._tensors(ENDS)
        files = [name for name in map(_block, range(self.done)) if (self.directory / name).is_file()]
        for index, file in enumerate(files):
            found |= {f"blocks.{index}.{name}": tensor for name, tensor in self._tensors(file).items()}
        return found

    def remove(self) -> None:
        """The model is whole: this is no longer needed."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _read(self, name: str) -> str | None:
        file = self.directory / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def _save(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        aside = self.directory / f"tmp-{name}"
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside, metadata)
            aside.replace(self.directory / name)
        except OSError as error:
            raise CheckpointError(f"{aside} can not be written ({error}): free space; what is done is kept") from error

    def _tensors(self, name: str) -> dict[str, Tensor]:
        with self._open(name) as reader:
            return {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 (not a dict)

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        file = self.directory / name
        try:
            with safe_open(file, framework="pt") as reader:
                yield reader
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} does not read ({error}): remove {self.directory}") from error


def _block(index: int) -> str:
    return f"block-{index:05d}.safetensors"
