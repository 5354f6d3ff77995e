"""A model on disk, read one tensor at a time: our names and shapes, whoever wrote it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import CheckpointError, ConfigError
from ...configs.typed import check
from ...parallel.apply import parallelize
from ...parallel.mesh import Mesh
from ...parallel.shard import ShardSpec
from ..config import ModelConfig
from ..layers.quantized import fixed_names
from ..models.decoder import Decoder
from ..models.store import WEIGHTS, is_foreign, load_config, match_tensors, model_directory
from ..shapes import is_router
from .directory import DTYPES, STORED, Foreign, match_places, open_foreign, stored_dtype
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
        self.cfg, self._reader, self._shapes = cfg, reader, whole_shapes(cfg)
        match_tensors({name: reader.get_tensor(name) for name in reader.keys()}, cfg, str(file))  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        found: Tensor = self._reader.get_tensor(name)
        return found.float()

    def part(self, name: str, place: ShardSpec, shape: tuple[int, ...]) -> Tensor:
        """What lies at `place`, of `shape`, as stored; nothing else is read."""
        held = self._reader.get_slice(name)
        return torch.cat([held[slices] for slices in place.pieces(shape)])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor."""
        return self._shapes

    def dtype(self, name: str, wanted: str | None) -> torch.dtype:
        """What `load_model` makes of a tensor when `wanted` is asked for."""
        stored = STORED[self._reader.get_slice(name).get_dtype()]
        return torch.float32 if is_router(name) else DTYPES[stored if wanted is None or wanted == "auto" else wanted]


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

    def part(self, name: str, place: ShardSpec, shape: tuple[int, ...]) -> Tensor:
        """What lies at `place`, of `shape`; the whole is read."""
        return place.take(self.read(name), shape).clone()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As `OwnSource.shapes`."""
        return self._shapes

    def dtype(self, name: str, wanted: str | None) -> torch.dtype:
        """As `OwnSource.dtype`."""
        found = DTYPES[stored_dtype(self._shards) if wanted is None or wanted == "auto" else wanted]
        return torch.promote_types(found, torch.float32) if is_router(name) else found


@contextmanager
def open_source(path: str | Path, *, rounded: bool = False) -> Iterator[OwnSource | ForeignSource]:
    """Open a run, a model directory, a Hugging Face directory or a GGUF file; names and shapes are checked first.

    Args:
        path: which.
        rounded: whether its matrices may be rounded, as `part` reads them.

    Raises:
        ConfigError: its configuration. CheckpointError: no model there, or files and tensors that do not fit it.
    """
    directory = model_directory(path)
    with ExitStack() as stack:
        if is_foreign(directory):
            yield ForeignSource(*stack.enter_context(open_foreign(directory)))
            return
        cfg, file = load_config(directory), directory / WEIGHTS
        if not rounded:
            check_whole(cfg, directory)
        try:
            reader = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} does not read as safetensors ({error}): export the model again") from error
        yield OwnSource(cfg, reader, file)


def check_whole(cfg: ModelConfig, directory: Path) -> None:
    """Refuse a model whose matrices have been rounded, where whole ones are needed.

    Raises:
        ConfigError: naming it.
    """
    rule, fix = f"is how {directory} is stored, and whole weights are needed here", "give the model it was made of"
    check(cfg.quantization is None, "quantization", cfg.quantization, rule, fix)


def whole_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter and persistent buffer."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(cfg).state_dict().items()}


@torch.no_grad()
def load_part(path: str | Path, mesh: Mesh, dtype: str | None = None) -> Decoder:
    """This rank's part of a servable model, in evaluation mode on the mesh's device.

    Some ranks may hold one expert more than others. No more than the part is in memory, of a foreign model one whole
    tensor besides.

    Args:
        path, dtype: as `load_model` has them.

    Raises:
        ConfigError, CheckpointError: as `load_model`, or the model can not be divided so.
    """
    if dtype not in (None, "auto", *DTYPES):
        raise ConfigError(f"dtype ({dtype}) is not supported: use auto, {', '.join(DTYPES)}")
    with open_source(path, rounded=True) as source:
        with torch.device("meta"):
            model = Decoder(source.cfg)
        places, fixed = parallelize(model, mesh, uneven=True), fixed_names(model)
        part = {}
        for name, local in model.state_dict().items():
            mine = source.part(name, places[name], tuple(local.shape))
            part[name] = mine.to(mesh.device, mine.dtype if name in fixed else source.dtype(name, dtype))
        model.load_state_dict(part, assign=True)
    model.tell_dtype()
    return model.eval().requires_grad_(False)
