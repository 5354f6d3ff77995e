"""Small GGUF files: a transformers Llama as llama.cpp's converter writes it, with any metadata or tensor replaced."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = "tokenizer.ggml.tokens"


def llama(**settings: Any) -> LlamaForCausalLM:
    """A Llama with random weights; two key heads, so that queries and keys are turned apart."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": "eager",
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def metadata_of(cfg: LlamaConfig) -> dict[str, Any]:
    """What the converter says of such a model, without rotary scaling."""
    return {
        "llama.vocab_size": cfg.vocab_size,
        "llama.block_count": cfg.num_hidden_layers,
        "llama.context_length": cfg.max_position_embeddings,
        "llama.embedding_length": cfg.hidden_size,
        "llama.feed_forward_length": cfg.intermediate_size,
        "llama.attention.head_count": cfg.num_attention_heads,
        "llama.attention.head_count_kv": cfg.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
        "llama.rope.freq_base": cfg.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": cfg.head_dim,
    }


def tensors_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Name → values: rows of queries and keys as the converter lays them, rotary pairs beside each other."""
    cfg = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.num_hidden_layers)
    heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        part = next((part for part in heads if part in name), None)
        if part is not None:
            halves = tensor.reshape(heads[part], 2, cfg.head_dim // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor.numpy()
    return found


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | None = None,
    kind: Kind = Kind.F32,
    architecture: str = "llama",
) -> Path:
    """Write a file; matrices are quantized to `kind`, all else is as it comes. A value of None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, values in (tensors or {}).items():
        if values.ndim == 2 and values.dtype == np.float32 and kind is not Kind.F32:
            writer.add_tensor(name, quantized(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(values: np.ndarray, kind: Kind) -> np.ndarray:
    """`values` in blocks of `kind`. For the K-quants, which gguf only reads, blocks of small random bytes instead."""
    try:
        return gguf.quantize(values, kind)
    except RuntimeError:  # gguf has no quantizer for this kind
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        return np.random.default_rng(0).integers(0, 0x38, shape, dtype=np.uint8)  # such scales are finite
