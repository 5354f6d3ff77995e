"""How the C library keeps a training process's memory (mallopt(3)): what lasts apart, what comes and goes kept.

A large block that is freed usually goes back to the system at once, and the next one costs a page fault every four
kilobytes, more time than filling it takes. So once the first step has made what lasts, weights and the optimizer's
states, each a mapping of its own, all later blocks come from one heap that is never given back. Other C libraries have
no such switches, and nothing happens.
"""

import ctypes
from typing import Any

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # malloc.h
LARGE = 1 << 18  # bytes of a block that lasts
NEVER = 2**31 - 1


def apart() -> None:
    """From now on every large block is a mapping of its own, which leaves no hole when it goes."""
    _set(MMAP_THRESHOLD, LARGE)


def keep() -> None:
    """From now on blocks come from the heap, and what is freed is kept for the next."""
    _set(MMAP_MAX, 0)
    _set(TRIM_THRESHOLD, NEVER)
    _set(TOP_PAD, 64 << 20)


def release() -> None:
    """Give back what is free now: after something that took more than a step does."""
    if (trim := getattr(_library(), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))


def _set(parameter: int, value: int) -> None:
    if (mallopt := getattr(_library(), "mallopt", None)) is not None:
        mallopt(parameter, value)


def _library() -> Any:
    return ctypes.CDLL(None)
