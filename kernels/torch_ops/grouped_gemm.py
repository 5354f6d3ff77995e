"""`torch.nn.functional.grouped_mm`, within its limits.

N rows, K input width, M output width, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ALIGNMENT = 16  # bytes at whose multiples grouped_mm wants tensors, rows and columns to begin, also on a CPU


def grouped_gemm_fits(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> bool:
    """Rows, columns and those of the gradients must be aligned; no float64."""
    K, M = w_EKM.shape[1:]
    dense = w_EKM.stride() in ((K * M, M, 1), (K * M, 1, K))
    whole = all(t.data_ptr() % ALIGNMENT == 0 for t in (x_NK, w_EKM))
    return dense and whole and x_NK.shape[0] > 0 and _aligned(x_NK, K, M)


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    return GroupedGemm.apply(x_NK, w_EKM, ends_E, _product)


class GroupedGemm(Function):
    """The product by any form of it, with its gradients.

    Not grouped_mm's own, which fails on the expanded gradient of a sum.
    """

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor, product: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x_NK, w_EKM, ends_E)
        ctx.product = product
        return product(x_NK, w_EKM, ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_NK, w_EKM, ends_E = ctx.saved_tensors
        grad_x = ctx.product(grad_NM, w_EKM.mT, ends_E) if ctx.needs_input_grad[0] else None
        grad_w = _weight_gradient(x_NK, grad_NM, ends_E) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None, None


def _product(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x_NK.contiguous(), w_EKM, offs=ends_E)


def _weight_gradient(x_NK: Tensor, grad_NM: Tensor, ends_E: Tensor) -> Tensor:
    """grad_w[e] = x[rows of e]ᵀ @ grad[rows of e]; zero for an expert without rows."""
    if x_NK.shape[0] > 0 and _aligned(x_NK, x_NK.shape[1], grad_NM.shape[1]):
        return torch.nn.functional.grouped_mm(x_NK.contiguous().mT, grad_NM.contiguous(), offs=ends_E)
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return torch.stack([x.mT @ g for x, g in zip(x_NK.split(sizes), grad_NM.split(sizes), strict=True)])


def _aligned(x: Tensor, *widths: int) -> bool:
    return x.dtype != torch.float64 and all(width * x.element_size() % ALIGNMENT == 0 for width in widths)
