"""Reading memory, as fast as this machine can."""

import ctypes

import torch
from torch import Tensor

from .build import library
from .call import call


def read(x: Tensor) -> int:
    """The exclusive or of a contiguous CPU tensor's 64-bit words, the rest after whole lines of 64 bytes left out.

    Without the compiled kernels the library's minimum reads it, which is slower.
    """
    lines = x.numel() * x.element_size() // 64
    if library() is None:
        return int(x.flatten().view(torch.uint8)[: 64 * lines].view(torch.int64).amin()) if lines else 0
    found = ctypes.c_uint64()
    call("read", ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(lines), ctypes.byref(found))
    return found.value
