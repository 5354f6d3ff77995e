"""The dtype in which sums are taken, and that of the operands."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

AS_IT_IS = nullcontext()


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would do to a matrix product's operands: cast all but float64 ones."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def exact(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off: the operands have their dtype already, and intermediate results keep theirs."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else AS_IT_IS
