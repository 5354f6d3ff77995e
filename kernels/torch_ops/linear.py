"""Matrix products by the library's calls, which know autocast themselves.

T tokens, D input width, F output width, H heads, K and M their input and output widths.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x_TD, w_FD, bias_F)


def head_gemm(x_THK: Tensor, w_HKM: Tensor) -> Tensor:
    return torch.einsum("thk,hkm->thm", x_THK, w_HKM)


def pointwise(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x)
