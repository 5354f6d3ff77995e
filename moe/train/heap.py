"""What a training process does about its memory: large tensors' blocks are kept for the next, small ones' given back.

A large block that is freed goes back to the system at once, and the next one costs a page fault every four kilobytes,
more time than filling it takes. So on a CPU blocks are kept (kernels/cpp/allocator.cc). Where that can not be built the
C library keeps them (mallopt(3)): once the first step has made what lasts, weights and the optimizer's states, each a
mapping of its own, all later blocks come from one heap that is never given back, of which up to a half are holes.
"""

import ctypes
from typing import Any

from ...kernels.cpp.blocks import keep_blocks, release_blocks

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # malloc.h
LARGE = 1 << 18  # bytes of a block that lasts
NEVER = 2**31 - 1


class Heap:
    """The process's memory. Begins before there are tensors that last."""

    def __init__(self) -> None:
        self.blocks, self.lasting = keep_blocks(), False
        if not self.blocks:
            _set(MMAP_THRESHOLD, LARGE)

    def keep(self) -> None:
        """What lasts is there: what is freed from now on is kept for the next. Again it does nothing."""
        if self.lasting:
            return
        self.lasting = True
        if not self.blocks:
            _set(MMAP_MAX, 0)
            _set(TRIM_THRESHOLD, NEVER)
            _set(TOP_PAD, 64 << 20)
        trim()

    def release(self) -> None:
        """Give back what is free now: after something that took more than a step does."""
        release_blocks()
        trim()


def trim() -> None:
    """Give back the free pages of the C library's heap."""
    if (found := getattr(_library(), "malloc_trim", None)) is not None:
        found(ctypes.c_size_t(0))


def _set(parameter: int, value: int) -> None:
    if (mallopt := getattr(_library(), "mallopt", None)) is not None:
        mallopt(parameter, value)


def _library() -> Any:
    return ctypes.CDLL(None)
