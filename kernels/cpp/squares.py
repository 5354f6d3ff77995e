"""The sum of the squares of a large tensor, in one pass: blocks of one size, added up in their order."""

from torch import Tensor

from .backward import square_sum
from .call import fits

__all__ = ["square_sum", "square_sum_fits", "square_sum_pays"]


def square_sum_fits(x: Tensor) -> bool:
    return x.is_contiguous() and fits(x)


def square_sum_pays(x: Tensor) -> bool:
    return x.device.type == "cpu"
