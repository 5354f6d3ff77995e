"""Where a rank's tensor lies in the global one: what a checkpoint must know to fit any layout. No torch here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ShardSpec:
    """The local tensor is `global[offset[0] : offset[0] + local.shape[0], ...]`.

    Attributes:
        global_shape: shape of the whole tensor.
        offset: where the local tensor begins in it, one number a dimension.
        along: the dimension of the mesh (`mesh.ALONG`) along which ranks hold the same slice,
            and its gradients are summed.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    along: Literal["stage", "replicas", "edp"] = "stage"

    def __post_init__(self) -> None:
        assert len(self.global_shape) == len(self.offset), "one offset a dimension"

    def is_whole(self, local_shape: tuple[int, ...]) -> bool:
        """Whether a local tensor of this shape is the whole one (then it is replicated)."""
        return tuple(local_shape) == self.global_shape
