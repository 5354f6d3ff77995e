"""`torch.nn.functional.grouped_mm`, within its limits.

N rows, K input width, M output width, E experts.
"""

import torch
from torch import Tensor


def grouped_gemm_fits(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> bool:
    """Rows, columns and their gradients must begin at multiples of 16 bytes, also on a CPU; no float64."""
    K, M = w_EKM.shape[1:]
    dense = w_EKM.stride() in ((K * M, M, 1), (K * M, 1, K))
    whole = all(t.data_ptr() % 16 == 0 for t in (x_NK, w_EKM))
    return dense and whole and x_NK.shape[0] > 0 and _aligned(x_NK, K, M)


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x_NK.contiguous(), w_EKM, offs=ends_E)


def weight_gradient(x_NK: Tensor, grad_NM: Tensor, ends_E: Tensor) -> Tensor:
    """grad_w[e] = x[rows of e]ᵀ @ grad[rows of e]; zero for an expert without rows."""
    if x_NK.shape[0] > 0 and _aligned(x_NK, x_NK.shape[1], grad_NM.shape[1]):
        return torch.nn.functional.grouped_mm(x_NK.contiguous().mT, grad_NM.contiguous(), offs=ends_E)
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return torch.stack([x.mT @ g for x, g in zip(x_NK.split(sizes), grad_NM.split(sizes), strict=True)])


def _aligned(x: Tensor, *widths: int) -> bool:
    return x.dtype != torch.float64 and all(width * x.element_size() % 16 == 0 for width in widths)
