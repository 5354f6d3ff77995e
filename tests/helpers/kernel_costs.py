"""What the batch-invariant kernels cost beside the library's: `python -m turnout.tests.helpers.kernel_costs`."""

import time
from collections.abc import Callable
from functools import partial

import torch

from turnout import kernels

SECONDS = 0.3


def best(form: str, f: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls."""
    with kernels.using(form), torch.inference_mode():
        f()
        found, end = [], time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            f()
            found.append(time.perf_counter() - start)
    return min(found)


def show(name: str, flops: float, f: Callable[[], object]) -> None:
    library, ours = best("torch", f), best("cpp", f)
    rates = f"{flops / library / 1e9:7.1f} {flops / ours / 1e9:7.1f} GFLOP/s"
    print(f"{name:44} {library * 1e3:8.3f} {ours * 1e3:8.3f} ms {rates} {library / ours:5.2f}")


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; library, ours, ours / library")
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(2048, 512).to(dtype)
        for T in (1, 4, 16, 64, 256, 512):
            show(f"linear {dtype} {T} x 512 x 2048", 2 * T * w.numel(), partial(kernels.linear, w[:T], w))
        for name, experts in (("w[k]", w.view(2, 1024, 512).mT), ("w[m]", w.view(2, 512, 1024))):
            for N in (2, 16, 256):
                ends = torch.tensor([N // 2, N], dtype=torch.int32)
                run = partial(kernels.grouped_gemm, w[:N], experts, ends)
                show(f"grouped {name} {dtype} {N} x 512 x 1024", 2 * N * 512 * 1024, run)
        for S, L in ((1, 256), (1, 2048), (256, 256), (512, 512)):
            q, k = torch.randn(S, 8, 64).to(dtype), torch.randn(L, 2, 64).to(dtype)
            cu, cu_k = torch.tensor([0, S]), torch.tensor([0, L])
            run = partial(kernels.varlen_attention, q, k, k, cu, scale=0.1, cu_k_B1=cu_k)
            show(f"attention {dtype} {S} of {L}, 8/2 heads of 64", 4 * 512 * S * (L - S / 2), run)


if __name__ == "__main__":
    main()
