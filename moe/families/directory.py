"""A Hugging Face directory or GGUF file as a model, and a model as such a directory: one tensor at a time."""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import CheckpointError, ConfigError
from ...configs.typed import build, to_dict
from ...kernels import memory
from ..config import ModelConfig
from ..models.decoder import Decoder
from ..shapes import is_router
from .family import Family, family
from .gguf import GgufFile, read_metadata
from .keys import Keys
from .mxfp4 import unpacked
from .place import Place
from .shards import FLOATS, Shards, Tensors, write_shards

LOG = logging.getLogger(__name__)
CONFIG, ORIGIN, GENERATION = "config.json", "origin.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", GENERATION,
    "special_tokens_map.json",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a directory's config.json, or a GGUF file's metadata, says.

    Attributes:
        family: its `model_type`'s.
        cfg: ours; a text ends at what generation_config.json says, too.
        data: theirs, as it is.
        unknown: keys that nobody has read: what they change, if anything, is not computed.
    """

    family: Family
    cfg: ModelConfig
    data: dict[str, Any]
    unknown: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the way back to a Hugging Face directory needs to be exact; `origin.json` of a Turnout directory.

    Attributes:
        config: their config.json.
        dtype: that most of their tensors had.
        dtypes: their name → dtype of those that had another.
    """

    config: dict[str, Any]
    dtype: str
    dtypes: dict[str, str]


def read_foreign(path: str | Path) -> Foreign:
    """Read and map a Hugging Face configuration.

    Args:
        path: the directory, or a GGUF file.

    Raises:
        ConfigError: not JSON, an unknown family, or a model that can not be computed here. CheckpointError: not GGUF.
    """
    if Path(path).is_file():
        with GgufFile(Path(path)) as source:
            return _read_gguf(source)
    file = Path(path) / CONFIG
    data = _json(file)
    if "model_type" not in data:
        raise ConfigError(f"{file} (no model_type) must be a model's configuration: copy the model's config.json again")
    found, keys = family(str(data["model_type"])).of(data), Keys(data)
    method = (data.get("quantization_config") or {}).get("quant_method", found.packed)
    if method != found.packed:
        raise ConfigError(f"quantization_config ({method}) must not be there: give the model in bfloat16 or float32")
    try:
        cfg = build(ModelConfig, to_dict(found.read(keys)))  # built strictly: a float is no number of layers
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        rule = f"does not read as a {found.name} ({error!r})"
        raise ConfigError(f"{file} {rule}: copy the model's config.json again") from error
    generation = Path(path) / GENERATION
    ends: Any = _json(generation).get("eos_token_id") if generation.is_file() else None
    listed: list[Any] = ends if isinstance(ends, list) else [ends]
    more = [end for end in listed if end not in (None, *cfg.eos_token_ids)]
    if more:
        cfg = replace(cfg, eos_token_id=(*cfg.eos_token_ids, *more) if cfg.eos_token_ids or more[1:] else more[0])
    return Foreign(family=found, cfg=cfg, data=data, unknown=tuple(keys.unknown))


def _read_gguf(source: GgufFile) -> Foreign:
    data, unread = read_metadata(source)
    keys = Keys(data, str(source.path))
    cfg = source.family.read(keys)
    return Foreign(family=source.family, cfg=cfg, data=data, unknown=(*keys.unknown, *unread))


@contextmanager
def open_foreign(path: Path) -> Iterator[tuple[Foreign, Tensors]]:
    """A directory's or GGUF file's configuration and its tensors, which are closed at the end."""
    if path.is_file():
        with GgufFile(path) as source:
            yield _read_gguf(source), source
    else:
        found = read_foreign(path)
        with Shards(path) as shards:
            yield found, unpacked(found.family, shards)


@torch.no_grad()
def load_foreign(path: str | Path, dtype: str | None = None, device: str | torch.device = "cpu") -> Decoder:
    """Load a Hugging Face directory or a GGUF file in evaluation mode.

    No more than the model and one tensor are in memory.

    Args:
        path: the directory or file.
        dtype: as `load_model` has it.
        device: where the weights go.

    Raises:
        ConfigError: the configuration. CheckpointError: a tensor is missing, unexpected, misshaped or no number.
    """
    with open_foreign(Path(path)) as (found, shards):
        if found.unknown:
            names = ", ".join(found.unknown)
            LOG.warning("%s: nobody here reads %s; what they change is not computed", shards.path, names)
        with torch.device("meta"):
            model = Decoder(found.cfg)
        model.load_state_dict(read_tensors(found, shards, dtype, device), assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read_tensors(
    found: Foreign, shards: Tensors, dtype: str | None = None, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Our tensors by name, made of theirs one at a time; arguments and errors as `load_foreign` has them."""
    with torch.device("meta"):
        expected = Decoder(found.cfg).state_dict()
    places = match_places(found, shards, expected)
    wanted = DTYPES[dtype if dtype not in (None, "auto") else stored_dtype(shards)]
    decides = torch.promote_types(wanted, torch.float32)
    ours = {
        name: memory.zeros(tensor.shape, decides if is_router(name) else wanted, device)
        for name, tensor in expected.items()
    }
    for name in shards:
        if name in places:
            theirs = shards.read(name)
            places[name].put(theirs, ours[places[name].ours])
            memory.forget(theirs)
    return ours


def origin_of(found: Foreign, shards: Tensors) -> Origin:
    """What to keep of a directory."""
    most = stored_dtype(shards)
    others = {name: STORED[shards.dtype(name)] for name in shards if shards.dtype(name) in STORED}
    return Origin(config=found.data, dtype=most, dtypes={name: kind for name, kind in others.items() if kind != most})


def load_origin(directory: Path) -> Origin | None:
    """The origin of a Turnout model directory; None if it has none.

    Raises:
        ConfigError: origin.json does not read.
    """
    file = directory / ORIGIN
    if not file.is_file():
        return None
    try:
        return Origin(**_json(file))
    except TypeError as error:
        raise ConfigError(f"{file} is no origin ({error}): convert the model again") from error


def match_places(found: Foreign, shards: Tensors, ours: Mapping[str, Tensor]) -> dict[str, Place]:
    """Their name → its place, after every name, shape and dtype has been found right.

    Raises:
        CheckpointError: naming the first tensor that is not.
    """
    places = {place.theirs: place for place in found.family.places(found.cfg)}
    held, source = set(shards), shards.path
    if missing := sorted(places.keys() - held):
        raise CheckpointError(f"{missing[0]} is missing in {source} ({len(missing)} in all): download it again")
    if extra := sorted(held - places.keys() - set(ignored_tensors(found, shards))):
        rule = f"has no place in a {found.family.name} of this configuration"
        raise CheckpointError(f"{extra[0]} in {source} {rule} ({len(extra)} in all): give the files of one model")
    for name, place in places.items():
        shape, needed = shards.shape(name), place.their_shape(ours[place.ours])
        if shape != needed:
            raise CheckpointError(
                f"{name} {list(shape)} in {source} must have shape {list(needed)}: its configuration says so"
            )
        if shards.dtype(name) not in FLOATS:
            kind = shards.dtype(name)
            raise CheckpointError(f"{name} ({kind}) in {source} must be floating point: give an unquantized model")
    return places


def ignored_tensors(found: Foreign, names: Iterable[str]) -> list[str]:
    """Those of `names` that say nothing: the family's buffers, and a head that is the embedding."""
    own = (pattern.format(layers=found.cfg.layers) for pattern in found.family.ignored)
    patterns = (*own, *(("lm_head.weight",) if found.cfg.tie_embeddings else ()))
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def save_foreign(
    directory: str | Path,
    cfg: ModelConfig,
    tensors: Mapping[str, Tensor],
    to: str,
    *,
    dtype: str | None = None,
    dtypes: Mapping[str, str] | None = None,
    origin: Mapping[str, Any] | None = None,
    beside: str | Path | None = None,
    most: int = SHARD_BYTES,
) -> Path:
    """Write a Hugging Face directory, replacing an earlier one only when the new one is whole.

    Args:
        directory: where.
        cfg: the model's configuration.
        tensors: every parameter and persistent buffer of ours, whole.
        to: the family's `model_type`.
        dtype: of the files; None = the embedding's.
        dtypes: their name → dtype, of tensors that have another.
        origin: the config.json that this model came with; its keys are kept where they still say the same.
        beside: a directory whose tokenizer travels along.
        most: bytes of a file.

    Raises:
        ConfigError: the family can not compute this model. CheckpointError: the directory can not be written.
    """
    kind = family(to)
    dtype = dtype or str(tensors["embed.weight"].dtype).removeprefix("torch.")
    data = config_of(cfg, kind, dtype, origin)
    places = {place.theirs: place for place in kind.of(data).places(cfg)}
    wanted = {
        name: torch.float32 if place.wide else DTYPES[(dtypes or {}).get(name, dtype)] for name, place in places.items()
    }

    def take(name: str) -> Tensor:
        return places[name].take(tensors[places[name].ours]).to("cpu", wanted[name])

    sizes = {name: place.of(tensors[place.ours]).numel() * wanted[name].itemsize for name, place in places.items()}
    directory = Path(directory)
    aside = directory.with_name(f"tmp-{directory.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_shards(aside, sizes, take, most)
        (aside / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(beside, aside)
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} can not be written ({error}): free space or choose another") from error
    return directory


def config_of(cfg: ModelConfig, kind: Family, dtype: str, origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """Their config.json: `origin`, if it still describes `cfg`; else written anew, with origin's other keys."""
    if origin is not None and origin.get("model_type") == kind.name:
        origin = {name: value for name, value in origin.items() if name != "quantization_config"}
        if replace(kind.read(Keys(origin)), eos_token_id=cfg.eos_token_id) == cfg:
            named = "torch_dtype" if "torch_dtype" in origin else "dtype"
            return {**origin, named: dtype}
        return {**origin, **kind.to_theirs(cfg, dtype)}
    return kind.to_theirs(cfg, dtype)


def copy_tokenizer(source: str | Path | None, target: Path) -> None:
    """The tokenizer's files, those that are there."""
    for name in TOKENIZER_FILES if source is not None else ():
        file = Path(source or "") / name
        if file.is_file():
            shutil.copyfile(file, target / name)


def stored_dtype(shards: Tensors) -> str:
    """The dtype that most tensors have."""
    kinds = [STORED[shards.dtype(name)] for name in shards if shards.dtype(name) in STORED]
    return max(set(kinds), key=kinds.count)


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} does not read as JSON ({error}): copy the model's {file.name} again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} ({type(data).__name__}) must hold a JSON object: copy the model's {file.name} again")
    return data
