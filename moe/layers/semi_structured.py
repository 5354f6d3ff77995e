"""Matrices of two numbers in every four, which a GPU multiplies without their zeros: for serving alone.

torch keeps the numbers and two bits for the place of each, 9/16 of the matrix, and sparse tensor cores pick the inputs
that meet them (Mishra et al. 2104.08378; `torch.sparse.to_sparse_semi_structured`). A stack of experts stays as it is:
torch multiplies one matrix at a time.

T tokens, D input width, F output width.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ...configs.typed import check
from .linear import Linear
from .quantized import matrices

FIELD = "semi_structured"
OFF = "use semi_structured=false"
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
ROWS, COLUMNS = 32, 64
"""What both of torch's backends want F and D to be multiples of; it pads T itself."""


def check_device(device: torch.device, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """Refuse what has no sparse tensor cores.

    Args:
        dtype: of the weights.
        capability: compute capability of a GPU.

    Raises:
        ConfigError: naming the option, what it needs and what there is.
    """
    check(device.type == "cuda", FIELD, "true", f"needs a GPU, and the model is on {device}", OFF)
    known = capability >= CAPABILITY
    rule = "needs compute capability {}.{}, and that of {} is {}.{}".format(*CAPABILITY, device, *capability)
    check(known, FIELD, "true", rule, OFF)
    check(dtype in DTYPES, FIELD, "true", f"needs 16 bits a weight, and these are {dtype}", "use dtype=bfloat16")


def two_of_four(w_FD: Tensor) -> bool:
    """Whether any four neighbours of a row, counted from its start, hold at most two numbers that are not 0."""
    quads = (padded(w_FD) != 0).unflatten(-1, (-1, 4))
    return bool((quads.sum(-1) <= 2).all())


def padded(w_FD: Tensor) -> Tensor:
    """With zeros to the sizes that the kernels take."""
    F, D = w_FD.shape
    return functional.pad(w_FD, (0, -D % COLUMNS, 0, -F % ROWS)).contiguous()


class SemiStructuredLinear(nn.Module):
    """y = x · Wᵀ + b of a W with `two_of_four`.

    Args:
        whole: its weight and bias, float16 or bfloat16.
        compress: gives torch's tensor of the padded weight; None = `torch.sparse.to_sparse_semi_structured`.
    """

    def __init__(self, whole: Linear, compress: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = whole.weight.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")  # it is a prototype
            made = (compress or torch.sparse.to_sparse_semi_structured)(padded(whole.weight.detach()))
        names, rest = made.__tensor_flatten__()
        self._kind, self._rest = type(made), rest
        for name in names:
            self.register_buffer(name, getattr(made, name))
        bias = whole.bias
        more = -self.out_features % ROWS
        self.bias = None if bias is None else nn.Parameter(functional.pad(bias.detach(), (0, more)), False)

    @property
    def stored(self) -> Tensor:
        """torch's tensor, over the buffers that hold its parts."""
        parts = dict(self.named_buffers(recurse=False))
        found: Tensor = self._kind.__tensor_unflatten__(parts, self._rest, None, None)
        return found

    def forward(self, x_TD: Tensor) -> Tensor:
        if len(x_TD) == 0:
            return x_TD.new_empty(0, self.out_features)
        if more := -self.in_features % COLUMNS:
            x_TD = functional.pad(x_TD, (0, more))
        return functional.linear(x_TD, self.stored, self.bias)[:, : self.out_features]


def skip_zeros(model: nn.Module, compress: Callable[[Tensor], Any] | None = None) -> list[str]:
    """Put `SemiStructuredLinear` in the places of the layers whose matrices allow it, in place; returns their names.

    Attention and feed-forward networks, not stacks of experts, embedding and head. A second call finds the same.

    Args:
        compress: as of `SemiStructuredLinear`.

    Raises:
        ConfigError: there is no such matrix, or no library that multiplies it.
    """
    done = [name for name, layer in model.named_modules() if isinstance(layer, SemiStructuredLinear)]
    found = [(name, layer) for name, layer in matrices(model) if two_of_four(layer.weight)]
    rule = "needs matrices of which any four neighbours hold two numbers, and the model has none"
    check(bool(done or found), FIELD, "true", rule, "make some: turnout compress CKPT DST method=sparsegpt pattern=2:4")
    known = compress is not None or torch.backends.cusparselt.is_available()
    rule, fix = "needs cuSPARSELt, which this PyTorch was built without", "install a wheel of PyTorch's for CUDA"
    check(known, FIELD, "true", rule, fix)
    for name, layer in found:
        model.set_submodule(name, SemiStructuredLinear(layer, compress))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # who plans memory asks the device what is free
    return done + [name for name, _ in found]
