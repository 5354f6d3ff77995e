"""Experts in MXFP4 (OCP Microscaling 1.0), as GPT-OSS is published, seen as ordinary tensors.

A matrix [in, out] is two: `*_blocks` uint8 [E, out, in / 32, 16], two numbers a byte, low half first, and `*_scales`
uint8 [E, out, in / 32], powers of two with a bias of 127. What comes out is bfloat16, exactly.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import CheckpointError
from .family import Family
from .shards import Tensors

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NUMBERS = 32  # share a scale


def unpacked(family: Family, tensors: Tensors) -> Tensors:
    """`tensors` as their family's places know them."""
    return Unpacked(tensors) if family.packed == "mxfp4" else tensors


class Unpacked:
    """`tensors`, in which every pair of blocks and scales is one tensor of their name.

    Raises:
        CheckpointError: a pair is not whole, or its shapes do not fit.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.path, self._tensors, self._packed = tensors.path, tensors, set[str]()
        held = set(tensors)
        for name in sorted(held):
            other = _other(name)
            if other is None:
                continue
            blocks, scales = (name, other) if name.endswith(BLOCKS) else (other, name)
            if other not in held:
                raise CheckpointError(f"{other} is missing in {tensors.path}, {name} is there: download it again")
            if tensors.shape(blocks) != (*tensors.shape(scales), NUMBERS // 2):
                shapes = f"{list(tensors.shape(blocks))} and {list(tensors.shape(scales))}"
                rule = f"must be [..., {NUMBERS // 2}] and [...]"
                raise CheckpointError(f"{blocks} and {scales} ({shapes}) in {tensors.path} {rule}: download them again")
            if {tensors.dtype(blocks), tensors.dtype(scales)} != {"U8"}:
                kinds = f"{tensors.dtype(blocks)} and {tensors.dtype(scales)}"
                raise CheckpointError(
                    f"{blocks} and {scales} ({kinds}) in {tensors.path} must be U8: download them again"
                )
            self._packed.add(blocks.removesuffix(BLOCKS))

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._tensors if _other(name) is None)
        yield from sorted(self._packed)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        if name not in self._packed:
            return self._tensors.shape(name)
        experts, out, groups = self._tensors.shape(name + SCALES)
        return experts, groups * NUMBERS, out

    def dtype(self, name: str) -> str:
        """As safetensors spells it, of what `read` means."""
        return "BF16" if name in self._packed else self._tensors.dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor, unpacked, on the CPU."""
        if name not in self._packed:
            return self._tensors.read(name)
        return unpack(self._tensors.read(name + BLOCKS), self._tensors.read(name + SCALES))


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [E, in, out] of blocks [E, out, in / 32, 16] and scales [E, out, in / 32], an expert at a time."""
    values = torch.tensor(VALUES, dtype=torch.bfloat16)
    experts, out, groups, _ = blocks.shape
    found = torch.empty(experts, groups * NUMBERS, out, dtype=torch.bfloat16)
    for whole, block, scale in zip(found, blocks, scales, strict=True):
        numbers = values[torch.stack((block & 15, block >> 4), -1).int()].flatten(-2)
        whole.copy_(torch.ldexp(numbers, scale.int()[..., None] - 127).flatten(1).T)
    return found


def _other(name: str) -> str | None:
    """The name of the other half of a pair."""
    for one, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        if name.endswith(one):
            return name.removesuffix(one) + other
    return None
