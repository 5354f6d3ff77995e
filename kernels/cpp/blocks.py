"""Memory of large tensors on a CPU, kept from one to the next (allocator.cc); PyTorch's own where it is not built."""

import ctypes
import functools
import logging
from pathlib import Path

import torch

from .build import SOURCES, UnbuiltError, load_units

LOG = logging.getLogger(__name__)


def keep_blocks() -> bool:
    """From now on, in the whole process; False where there is no such allocator."""
    if (allocator := _allocator()) is None:
        return False
    allocator.turnout_keep_blocks()
    return True


def release_blocks() -> None:
    """Give back to the system what no tensor has."""
    if (allocator := _allocator()) is not None:
        allocator.turnout_release_blocks()


@functools.cache
def _allocator() -> ctypes.CDLL | None:
    unit, home = SOURCES / "allocator.cc", Path(torch.__file__).parent
    flags = ("-std=c++20", "-O2", "-fPIC", f"-I{home / 'include'}", f'-DTORCH="{torch.__version__}"')
    try:
        return load_units([unit], flags, (f"-L{home / 'lib'}", "-lc10"), [unit])
    except (UnbuiltError, OSError) as error:
        LOG.warning("no allocator of blocks (%s): a training step takes more memory", error)
        return None
