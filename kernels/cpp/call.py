"""How Python reaches the C++ kernels: types by number, gradients by a twin."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .build import library

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8 = 3  # of pages
NOTE: ContextVar[Callable[[Any, Sequence[Any]], None] | None] = ContextVar("note", default=None)
"""Who wants to know of each kernel's call, its arguments with it."""


def fits(*tensors: Tensor | None) -> bool:
    """On a CPU, of a type that the kernels know, all of one type; and there are kernels."""
    dtype = None
    for t in tensors:  # in a loop, because it is asked before every operation
        if t is not None:
            if not t.is_cpu or t.dtype not in TYPES or dtype not in (None, t.dtype):
                return False
            dtype = t.dtype
    return library() is not None


def inferring(x: Tensor) -> bool:
    """On a CPU, and nothing learns: a form of ours may run unasked.

    Having no gradient is not enough: a first pass whose activations are computed again has none either, and must have
    the bits of the second.
    """
    return x.is_cpu and torch.is_inference_mode_enabled()


def call(name: str, *arguments: Any) -> int:
    """Run a kernel on as many threads as torch would; what it returns, if it returns something."""
    kernels = library()
    assert kernels is not None, "a form runs only where it fits"
    run, arguments = getattr(kernels, f"turnout_{name}"), (*arguments, torch.get_num_threads())
    if (note := NOTE.get()) is not None:
        note(run, arguments)
    status: int = run(*arguments)
    return status


def kernel(name: str, types: tuple[Any, ...]) -> Callable[..., None]:
    """A kernel that takes plain numbers for arguments of these types."""
    kernels = library()
    assert kernels is not None, "a form runs only where it fits"
    found = getattr(kernels, name)
    if found.argtypes is None:
        found.argtypes, found.restype = types, None
    note = NOTE.get()
    return found if note is None else partial(_noted, note, found)


def _noted(note: Callable[[Any, Sequence[Any]], None], run: Callable[..., None], *arguments: Any) -> None:
    note(run, arguments)
    run(*arguments)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def differentiable(run: Callable[..., Tensor], twin: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`run(*tensors)`, with the gradient of `twin`, which computes the same in PyTorch."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Twin.apply(run, twin, *tensors)
    return run(*tensors)


class _Twin(Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], twin: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.twin = twin
        return run(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            y = ctx.twin(*inputs)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needed)
