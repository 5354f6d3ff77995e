"""Host memory for what is read whole again and again: huge pages, and given back page by page.

A core that reads 4-KiB pages waits for their addresses: the same weights come at half as much again from pages of
2 MiB, which Linux gives to memory that asks for them before it is first written.
"""

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HUGE = 2**21
"""Bytes of a huge page. Smaller tensors come from the allocator."""
POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE (5.14), which Python 3.11 has no name for."""


def zeros(shape: Sequence[int], dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """Zeros; on a CPU under Linux in huge pages, each of which takes memory only once something is written to it.

    Elsewhere `torch.zeros`.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE or sys.platform != "linux":
        return torch.zeros(*shape, dtype=dtype, device=device)
    room = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        room.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % HUGE
    return torch.frombuffer(room, dtype=dtype, count=math.prod(shape), offset=start).view(*shape)


def populate(tensor: Tensor) -> None:
    """Give a contiguous tensor its pages now, with what is in them, so that nobody waits for one later; any thread may.

    Without effect where the system has no such call.
    """
    if tensor.device.type == "cpu" and sys.platform == "linux" and tensor.is_contiguous() and tensor.nbytes >= HUGE:
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(first, tensor.data_ptr() + tensor.nbytes - first, POPULATE_WRITE)


def forget(tensor: Tensor) -> None:
    """Give back the pages of a contiguous tensor that nobody reads any more, at once; a mapped file reads them anew.

    Without effect where there is nothing to give back.
    """
    if tensor.device.type == "cpu" and sys.platform == "linux" and tensor.is_contiguous():
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - first
        if size >= mmap.PAGESIZE:
            _madvise()(first, size // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
