"""A model on disk, read one tensor at a time: our names and shapes, whoever wrote it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import CheckpointError
from ..config import ModelConfig
from ..models.decoder import Decoder
from ..models.store import WEIGHTS, is_foreign, load_config, model_directory
from .directory import Foreign, match_places, open_foreign
from .place import Place
from .shards import Tensors


class Source(Protocol):
    """Whole tensors of a model by our names."""

    @property
    def cfg(self) -> ModelConfig:
        """The model."""
        ...

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU; in float32 where it comes from disk."""
        ...


class OwnSource:
    """A servable directory of ours."""

    def __init__(self, cfg: ModelConfig, reader: Any, file: Path) -> None:
        self.cfg, self._reader = cfg, reader
        shapes, held = whole_shapes(cfg), set(reader.keys())
        for name in sorted(shapes.keys() ^ held):
            word = "is missing in" if name in shapes else "is not the model's, but lies in"
            raise CheckpointError(f"{name} {word} {file}: export the model again")
        for name, shape in shapes.items():
            found = tuple(reader.get_slice(name).get_shape())
            if found != shape:
                raise CheckpointError(f"{name} {list(found)} in {file} must have shape {list(shape)}: export it again")

    def read(self, name: str) -> Tensor:
        found: Tensor = self._reader.get_tensor(name)
        return found.float()


class ForeignSource:
    """A Hugging Face directory or a GGUF file."""

    def __init__(self, found: Foreign, shards: Tensors) -> None:
        self.cfg, self._shards, self._shapes = found.cfg, shards, whole_shapes(found.cfg)
        ours = {name: torch.empty(shape, device="meta") for name, shape in self._shapes.items()}
        self._places: dict[str, list[Place]] = {name: [] for name in ours}
        for place in match_places(found, shards, ours).values():
            self._places[place.ours].append(place)

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        whole = torch.empty(self._shapes[name])
        for place in self._places[name]:
            place.put(self._shards.read(place.theirs), whole)
        return whole


@contextmanager
def open_source(path: str | Path) -> Iterator[Source]:
    """Open a run, a model directory, a Hugging Face directory or a GGUF file; names and shapes are checked first.

    Raises:
        ConfigError: its configuration. CheckpointError: no model there, or files and tensors that do not fit it.
    """
    directory = model_directory(path)
    with ExitStack() as stack:
        if is_foreign(directory):
            yield ForeignSource(*stack.enter_context(open_foreign(directory)))
            return
        cfg, file = load_config(directory), directory / WEIGHTS
        try:
            reader = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} does not read as safetensors ({error}): export the model again") from error
        yield OwnSource(cfg, reader, file)


def whole_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter and persistent buffer."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(cfg).state_dict().items()}
