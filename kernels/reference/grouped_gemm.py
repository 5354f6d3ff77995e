"""One matrix product an expert, in a loop.

N rows, K input width, M output width, E experts.
"""

import torch
from torch import Tensor


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return torch.cat([x @ w for x, w in zip(x_NK.split(sizes), w_EKM.unbind(0), strict=True)])
