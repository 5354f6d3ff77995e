"""`torch.nn.functional.grouped_mm`, within its limits.

N rows, K input width, M output width, E experts.
"""

import torch
from torch import Tensor


def grouped_gemm_fits(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> bool:
    """Rows, columns and their gradients must begin at multiples of 16 bytes, also on a CPU; no float64."""
    K, M = w_EKM.shape[1:]
    strides = w_EKM.stride()
    dense = strides[1:] in ((M, 1), (1, K)) and strides[0] == K * M
    aligned = all(size * x_NK.element_size() % 16 == 0 for size in (K, M))
    whole = all(t.data_ptr() % 16 == 0 for t in (x_NK, w_EKM))
    return dense and aligned and whole and x_NK.shape[0] > 0 and x_NK.dtype != torch.float64


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x_NK.contiguous(), w_EKM, offs=ends_E)
