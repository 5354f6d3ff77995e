"""The tensors of a Hugging Face directory: safetensors only, one file or several with an index, checked before use."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import CheckpointError

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}


class Tensors(Protocol):
    """Foreign tensors on disk; a context manager, for files stay open.

    Attributes:
        path: where they lie.
    """

    path: Path

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""

    def dtype(self, name: str) -> str:
        """As safetensors spells it: `F32`, `BF16`, ..."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU in its own dtype."""


class Shards:
    """Names, shapes and bytes of a directory's tensors; a context manager, for the files stay open.

    Raises:
        CheckpointError: no safetensors there, a file missing or broken, or an index that does not fit the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for file, names in self._listed().items():
                self._add(file, names)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: `F32`, `BF16`, ..."""
        return str(self._files[name].get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU in its own dtype."""
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def _listed(self) -> dict[str, set[str] | None]:
        """File → the tensors that the index says it has; None where there is no index."""
        index, one = self.path / INDEX, self.path / ONE
        if not index.is_file():
            if one.is_file():
                return {ONE: None}
            pickled = sorted(file.name for file in self.path.glob("*.bin"))
            instead = f" ({pickled[0]} is a pickle, which is never read)" if pickled else ""
            raise CheckpointError(f"{self.path} holds no {ONE} and no {INDEX}{instead}: give safetensors")
        try:
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, set[str]] = {}
            for name, file in placed.items():
                if Path(file).name != file:
                    raise CheckpointError(f"{file} in {index} must be a file beside it: download the index again")
                files.setdefault(file, set()).add(name)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} does not read as an index ({error!r}): download it again") from error
        return {**files}

    def _add(self, file: str, listed: set[str] | None) -> None:
        path = self.path / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {INDEX} lists it: download that shard")
        try:
            reader = self._open.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} does not read as safetensors ({error}): download it again") from error
        held = set(reader.keys())
        if listed is not None and held != listed:
            name = min(held ^ listed)
            where = "lists" if name in listed else "does not list"
            raise CheckpointError(f"{name} of {path}: {INDEX} {where} it, the file says otherwise: download both again")
        self._files.update(dict.fromkeys(sorted(held), reader))


def write_shards(directory: Path, sizes: Mapping[str, int], tensors: Any, most: int) -> int:
    """Write tensors into one file, or several of at most `most` bytes with an index; one shard is in memory at a time.

    Args:
        directory: where; it exists.
        sizes: name → bytes, in the order of the files.
        tensors: name → tensor, called as they are written.
        most: bytes of a file; a larger tensor has one of its own.

    Returns:
        the bytes of all tensors.
    """
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    placed: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = ONE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: tensors(name) for name in names}, directory / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(names, file))
    total = sum(sizes.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
