"""What this machine can do at best, measured: reading memory and multiplying matrices."""

import mmap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import Tensor

from ...kernels import memory
from ...kernels.cpp.stream import read

BYTES = 1 << 28  # that are read: more than any cache
SIDE = 2048  # of the matrices
ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The best of several runs.

    Args:
        read: bytes/s from huge pages (of a GPU: its memory, copied, reads and writes counted).
        read_small_pages: bytes/s from pages of 4 KB.
        bfloat16, float32: FLOP/s of a matrix product.
    """

    read: float
    read_small_pages: float
    bfloat16: float
    float32: float

    def or_better(self, other: "Ceilings") -> "Ceilings":
        """The better of each: a neighbour may have been busy."""
        return Ceilings(**{name: max(value, getattr(other, name)) for name, value in asdict(self).items()})

    def figures(self, seconds: float, size: float, flops: float) -> dict[str, float]:
        """A time, the rates that it means, and which share it reaches of what so much work in bfloat16 allows."""
        return {
            "ms": 1e3 * seconds,
            "megabytes": size / 1e6,
            "gigaflops": flops / 1e9,
            "GB/s": size / seconds / 1e9,
            "GFLOP/s": flops / seconds / 1e9,
            "of the ceiling": max(size / self.read, flops / self.bfloat16) / seconds,
        }

    def __str__(self) -> str:
        memory = f"{self.read / 1e9:.1f} GB/s read ({self.read_small_pages / 1e9:.1f} from 4-KB pages)"
        return f"{memory}, matrix products {self.bfloat16 / 1e9:.0f} GFLOP/s bf16, {self.float32 / 1e9:.0f} float32"


def device() -> torch.device:
    """Where kernels are measured: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(device: torch.device) -> Ceilings:
    """Measure this machine, or its GPU; takes a second or two."""
    products = {dtype: _product(dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    if device.type != "cpu":
        x = torch.empty(BYTES, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        copied = 2 * BYTES / _best(lambda: y.copy_(x), device)
        return Ceilings(read=copied, read_small_pages=copied, bfloat16=products[torch.bfloat16],
                        float32=products[torch.float32])  # fmt: skip
    rates = []
    for huge in (True, False):
        x = pages((BYTES,), torch.uint8, huge=huge).fill_(1)
        rates.append(BYTES / _best(lambda x=x: read(x), device))  # type: ignore[misc]
    return Ceilings(
        read=max(rates), read_small_pages=rates[1], bfloat16=products[torch.bfloat16], float32=products[torch.float32]
    )


def pages(shape: tuple[int, ...], dtype: torch.dtype, *, huge: bool = True) -> Tensor:
    """Zeros in memory of their own: huge pages where the system grants them, or pages of 4 KB."""
    if huge or prod(shape) == 0:
        return memory.zeros(shape, dtype)
    held = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(held, dtype=dtype).view(shape)


def _product(dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.ones(SIDE, SIDE, dtype=dtype, device=device) for _ in range(2))
    return 2 * SIDE**3 / _best(lambda: a @ b.mT, device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS):
        if device.type != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
