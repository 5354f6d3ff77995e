"""Tensors as a stream of safetensors bytes: hashed and written one tensor at a time, never a second copy of all.

The format is https://github.com/huggingface/safetensors#format; it is read back by the library itself.
"""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The first bytes of a safetensors file: what follows, and where."""
    told, end = {}, 0
    for name in _order(tensors):
        begin, end = end, end + tensors[name].nbytes
        dtype, shape = NAMES[tensors[name].dtype], list(tensors[name].shape)
        told[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stream(tensors: Mapping[str, Tensor], head: bytes) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file that begins with its `header`."""
    yield head
    for name in _order(tensors):
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Widest elements first, so that each is aligned, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
