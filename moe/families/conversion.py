"""A model on its way from one directory to another: read whole, whatever its format, then written in any."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import ConfigError
from ..config import ModelConfig
from ..models.store import TOKENIZER, is_foreign, load_tensors, model_directory, save_model, tokenizer_directory
from ..shapes import KVForm, is_expert, is_router
from ..upcycle_config import UpcycleConfig
from .directory import (
    DTYPES,
    Origin,
    ignored_tensors,
    load_origin,
    open_foreign,
    origin_of,
    read_tensors,
    save_foreign,
)
from .family import MODULES, fitting
from .reading import check_whole, whole_shapes
from .upcycle import Upcycled

OURS = "turnout"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A model in memory and what belongs to it.

    Args:
        cfg: the model.
        tensors: every parameter and buffer of ours, whole.
        dtype: of most of them.
        path: where it was found; its tokenizer is there.
        kind: `turnout`, or the `model_type` that it was read as.
        origin: the Hugging Face directory that it is or once was; None = it is ours, or has been changed since.
        unknown: keys of its configuration that nobody read.
        ignored: tensors that say nothing.
    """

    cfg: ModelConfig
    tensors: Mapping[str, Tensor]
    dtype: str
    path: Path
    kind: str = OURS
    origin: Origin | None = None
    unknown: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def read_whole(path: str | Path) -> Whole:
    """A run, a Turnout model directory, a Hugging Face directory or a GGUF file.

    Raises:
        CheckpointError: files are missing or malformed. ConfigError: the model can not be computed here.
    """
    directory = model_directory(path)
    if not is_foreign(directory):
        cfg, tensors = load_tensors(directory)
        check_whole(cfg, directory)
        dtype = str(tensors["embed.weight"].dtype).removeprefix("torch.")
        return Whole(cfg=cfg, tensors=tensors, dtype=dtype, path=directory, origin=load_origin(directory))
    with open_foreign(directory) as (found, shards):
        origin = origin_of(found, shards)
        return Whole(
            cfg=found.cfg, tensors=read_tensors(found, shards), dtype=origin.dtype, path=directory,
            kind=found.family.name, origin=origin, unknown=found.unknown,
            ignored=tuple(ignored_tensors(found, shards)),
        )  # fmt: skip


def make_sparse(source: Whole, how: UpcycleConfig) -> Whole:
    """The model upcycled, in the dtype that it is stored in; routers are float32.

    Raises:
        ConfigError: the model can not become what `how` says.
    """
    made = Upcycled(InMemory(source.cfg, source.tensors), how)
    tensors = {name: made.read(name) for name in whole_shapes(made.cfg)}
    return replace(source, cfg=made.cfg, tensors=tensors, origin=None)


@dataclass(frozen=True)
class InMemory:
    """A `Source` of tensors as they are stored."""

    cfg: ModelConfig
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def target_kind(source: Whole, to: str | None) -> str:
    """What to write: `to`; else turnout for what is foreign, and for ours its origin's family or the first that fits.

    Raises:
        ConfigError: an unknown kind, or no family can compute the model.
    """
    if to is not None:
        rule, fix = "must be a format that can be written", f"use {OURS}, {', '.join(MODULES)}"
        if to != OURS and to not in MODULES:
            raise ConfigError(f"to ({to}) {rule}: {fix}")
        return to
    if source.kind != OURS:
        return OURS
    if source.origin is not None and source.origin.config["model_type"] in MODULES:
        return str(source.origin.config["model_type"])
    return fitting(source.cfg).name


def write_whole(source: Whole, directory: str | Path, to: str, dtype: str | None = None) -> Path:
    """Write the model as `to`, a family's `model_type` or `turnout`.

    Args:
        source: the model.
        directory: where; an earlier model there is replaced only when the new one is whole.
        to: the format.
        dtype: of the files; None = as the model is stored. Our routers stay float32.

    Raises:
        ConfigError: the family can not compute the model. CheckpointError: the directory can not be written.
    """
    origin = source.origin
    with tokenizer_directory(source.path) as beside:
        if to == OURS:
            wanted = DTYPES[dtype or source.dtype]
            tensors = {n: t if is_router(n) else t.to(wanted) for n, t in source.tensors.items()}
            tokenizer = beside if (beside / TOKENIZER).is_file() else None
            return save_model(directory, source.cfg, tensors, tokenizer, origin)
        back = origin is not None and origin.config["model_type"] == to and dtype in (None, origin.dtype)
        return save_foreign(
            directory, source.cfg, source.tensors, to,
            dtype=dtype or (origin.dtype if back and origin else source.dtype),
            dtypes=origin.dtypes if back and origin else None, origin=origin.config if origin else None, beside=beside,
        )  # fmt: skip


def describe(source: Whole, dtype: str) -> dict[str, Any]:
    """What a conversion to `dtype` reports of a model: parameters, cache, and what was left out."""
    cfg, sizes = source.cfg, {name: tensor.numel() for name, tensor in source.tensors.items()}
    idle = 0 if cfg.moe is None else 1 - cfg.moe.top_k / cfg.moe.num_experts
    kinds = {cfg.heads: "multi-head", 1: "multi-query"}
    kind = "latent" if cfg.attention.latent is not None else kinds.get(cfg.kv_heads, "grouped-query")
    return {
        "read_as": source.kind,
        "parameters": sum(sizes.values()),
        "active_parameters": round(sum(n * (1 - idle * is_expert(name)) for name, n in sizes.items())),
        "attention": kind,
        "window": cfg.attention.window,
        "kv_bytes_per_token": KVForm.of(cfg).numbers * DTYPES[dtype].itemsize,
        "dtype": dtype,
        "unknown_keys": list(source.unknown),
        "ignored_tensors": list(source.ignored),
    }
