"""Where a rank's tensor lies in the global one: what a checkpoint must know to fit any layout. No torch here."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ShardSpec:
    """The local tensor is `global[offset[0] : offset[0] + local.shape[0], ...]`.

    Attributes:
        global_shape: shape of the whole tensor.
        offset: where the local tensor begins in it, one number a dimension.
        along: the dimension of the mesh (`mesh.ALONG`) along which ranks hold the same slice,
            and its gradients are summed; "alone" when no other rank holds it.
        parts: the first dimension is so many equal parts one after another (the gates and the up projection of a
            SwiGLU); the local tensor is then the same slice of each, at `offset` in each.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    along: Literal["stage", "replicas", "edp", "alone"] = "stage"
    parts: int = 1

    def __post_init__(self) -> None:
        assert len(self.global_shape) == len(self.offset), "one offset a dimension"

    @property
    def block(self) -> "ShardSpec":
        """The same place with the parts as a dimension of their own, [parts, ...]: one block at every layout."""
        if self.parts == 1:
            return self
        shape, offset = self.unfold(self.global_shape), (0, *self.offset)
        return replace(self, global_shape=shape, offset=offset, parts=1)

    def unfold(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of `shape` with the parts as a dimension of their own."""
        return tuple(shape) if self.parts == 1 else (self.parts, shape[0] // self.parts, *shape[1:])

    def take(self, whole: "Tensor", local_shape: tuple[int, ...]) -> "Tensor":
        """This rank's part, of `local_shape`, of the whole tensor."""
        return whole.reshape(self.block.global_shape)[self.place(local_shape)].reshape(local_shape)

    def pieces(self, local_shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
        """Where a local tensor of this shape lies in the whole one: a piece of each part, which are it together."""
        rows, *others = self.place(local_shape)[-len(local_shape) :]
        each = self.global_shape[0] // self.parts
        return [(slice(i * each + rows.start, i * each + rows.stop), *others) for i in range(self.parts)]

    def place(self, local_shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where a local tensor of this shape lies in the whole one, once both have the parts as a dimension."""
        local = self.unfold(local_shape)
        return tuple(slice(first, first + size) for first, size in zip(self.block.offset, local, strict=True))
