"""The servable form of a model: a directory with `config.json`, `model.safetensors` and the tokenizer's files.

Written aside and renamed, so a directory is whole or absent; read strictly, naming what does not fit.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import CheckpointError, ConfigError
from ...configs.typed import build, to_dict
from ...kernels import memory
from ..config import ModelConfig
from ..families.directory import DTYPES, ORIGIN, Origin, copy_tokenizer, load_foreign, read_foreign
from ..families.gguf import PACKAGE, GgufFile, package_file
from ..families.gguf_tokenizer import write_tokenizer
from ..layers.quantized import fixed_names
from .decoder import Decoder

MODEL_TYPE = "turnout"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER = "tokenizer.json"
NAN = 0x7F  # of e4m3, whatever its sign


def save_model(
    directory: str | Path,
    cfg: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: str | Path | None = None,
    origin: Origin | None = None,
) -> Path:
    """Write a servable directory, replacing an earlier one only when the new one is whole.

    Args:
        directory: where.
        cfg: the model's configuration.
        tensors: every parameter and persistent buffer under its global name, whole (not sharded).
        tokenizer: a directory whose `tokenizer.json` travels along, and what else belongs to it.
        origin: where the model came from, so that the way back is exact.

    Raises:
        CheckpointError: `tensors` are not exactly the model's, or the directory can not be written.
    """
    match_tensors(tensors, cfg, "the tensors to save")
    directory = Path(directory)
    aside = directory.with_name(f"tmp-{directory.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps({"model_type": MODEL_TYPE, **to_dict(cfg)}, indent=1) + "\n")
        if tokenizer is not None:
            shutil.copyfile(Path(tokenizer) / TOKENIZER, aside / TOKENIZER)
            copy_tokenizer(tokenizer, aside)
        if origin is not None:
            (aside / ORIGIN).write_text(json.dumps(asdict(origin), indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    except OSError as error:
        raise CheckpointError(
            f"{directory} can not be written ({error}): free space or choose another place"
        ) from error
    return directory


def model_directory(path: str | Path) -> Path:
    """The model directory that `path` means: itself, or `model/` of a run; a GGUF file stands for itself.

    Args:
        path: a directory, a GGUF file, or `package:NAME` for the one GGUF file of an installed Python package.

    Raises:
        CheckpointError: there is no model.
    """
    if str(path).startswith(PACKAGE):
        return package_file(str(path))
    path = Path(path)
    if path.is_file():
        return path
    for candidate in (path, path / "model"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise CheckpointError(f"{path} holds no model ({CONFIG} is missing): give a run or a model directory")


@contextmanager
def tokenizer_directory(path: str | Path) -> Iterator[Path]:
    """The directory of the model's tokenizer files: its own; for a GGUF file one that goes when the context ends.

    Raises:
        CheckpointError: no model there, or a broken tokenizer. ConfigError: one that is not understood.
    """
    place = model_directory(path)
    if not place.is_file():
        yield place
        return
    with TemporaryDirectory() as directory:
        with GgufFile(place) as file:
            write_tokenizer(file, Path(directory))
        yield Path(directory)


def load_config(path: str | Path) -> ModelConfig:
    """Read and validate the configuration of a model directory or GGUF file.

    Raises:
        CheckpointError: no model there. ConfigError: not a Turnout configuration.
    """
    place = model_directory(path)
    data = {} if place.is_file() else _config(place)
    kind = data.pop("model_type", None)
    return build(ModelConfig, data) if kind == MODEL_TYPE else read_foreign(place).cfg


def is_foreign(path: str | Path) -> bool:
    """Whether the directory is Hugging Face's, not ours, or a GGUF file.

    Raises:
        CheckpointError: no model there. ConfigError: its configuration does not read.
    """
    place = model_directory(path)
    return place.is_file() or bool(_config(place)["model_type"] != MODEL_TYPE)


def load_model(path: str | Path, dtype: str | None = None, device: str | torch.device = "cpu") -> Decoder:
    """Load a servable model in evaluation mode.

    Args:
        path: a run, a model directory, a Hugging Face directory or a GGUF file (also `package:NAME`) as it is.
        dtype: `float32`, `bfloat16`, `float16` or `float64`; None or `auto` = as stored. Routers stay float32.
        device: where the weights go.

    Raises:
        CheckpointError: files are missing or malformed, or tensors are missing, unexpected, misshaped.
        ConfigError: the configuration does not validate, or the dtype is unknown.
    """
    if dtype not in (None, "auto", *DTYPES):
        raise ConfigError(f"dtype ({dtype}) is not supported: use auto, {', '.join(DTYPES)}")
    if is_foreign(path):
        return load_foreign(model_directory(path), dtype, device)
    cfg, tensors = load_tensors(path)
    with torch.device("meta"):
        model = Decoder(cfg)
    wanted, fixed = DTYPES.get(dtype or "auto"), fixed_names(model)
    for name, tensor in tensors.items():
        kind = torch.float32 if ".router." in name else wanted or tensor.dtype
        tensors[name] = memory.zeros(tensor.shape, tensor.dtype if name in fixed else kind, device).copy_(tensor)
        memory.forget(tensor)
    model.load_state_dict(tensors, assign=True)
    model.tell_dtype()
    return model.eval().requires_grad_(False)


def load_tensors(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A Turnout model's configuration and its tensors as stored; arguments and errors as `load_model` has them."""
    cfg, file = load_config(path), model_directory(path) / WEIGHTS
    try:
        with safe_open(file, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} does not read as safetensors ({error}): export the model again") from error
    match_tensors(tensors, cfg, str(file))
    return cfg, tensors


def _config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} does not read as JSON ({error}): export the model again") from error
    if not isinstance(data, dict) or "model_type" not in data:
        raise ConfigError(f"{file} (no model_type) must be a model's configuration: export the model again")
    return data


def match_tensors(tensors: Mapping[str, Tensor], cfg: ModelConfig, source: str) -> None:
    """Check that `tensors` are exactly the model's, in shape and, where its codes have one, in type.

    Raises:
        CheckpointError: naming the first that is not, and `source`.
    """
    with torch.device("meta"):
        model = Decoder(cfg)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kinds = {name: model.state_dict()[name].dtype for name in fixed_names(model)}
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        words = [
            f"{kind} {names[0]} ({len(names)} in all)" for kind, names in (("miss", missing), ("add", extra)) if names
        ]
        raise CheckpointError(f"{source} {' and '.join(words)}: they must be exactly the tensors of {CONFIG}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            raise CheckpointError(f"{name} {found} in {source} must have shape {list(shape)}: {CONFIG} does not fit it")
        kind = tensors[name].dtype
        if kind != kinds.get(name, kind) or not (name in kinds or kind.is_floating_point):
            rule = f"must be {kinds.get(name, 'floating point')}"
            raise CheckpointError(f"{name} ({kind}) in {source} {rule}: export it again")
        if kind == torch.float8_e4m3fn and (tensors[name].view(torch.uint8) & NAN == NAN).any():
            rule = "must be finite, and the kernels know no other e4m3"
            raise CheckpointError(f"{name} (NaN) in {source} {rule}: compress the model again")
