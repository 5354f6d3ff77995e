"""AdamW's step of a parameter in one pass over its memory; in float32, whatever type the gradients have."""

from ctypes import c_float, c_int64, c_void_p

from torch import Tensor, float32

from .call import TYPES, call, fits

__all__ = ["adamw_step", "adamw_step_fits", "adamw_step_pays"]


def adamw_step(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *,
    step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, scale: float = 1.0,
) -> None:  # fmt: skip
    beta1, beta2 = betas
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    numbers = (scale, 1 - lr * decay, 1 - beta1, 1 - beta2, rate, root, eps)
    places = (c_void_p(tensor.data_ptr()) for tensor in (weight, grad.contiguous(), mean, square))
    call("adamw", TYPES[grad.dtype], *places, c_int64(weight.numel()), *map(c_float, numbers))


def adamw_step_fits(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *,
    step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, scale: float = 1.0,
) -> bool:  # fmt: skip
    held = (weight, mean, square)
    return weight.dtype == float32 and fits(*held) and fits(grad) and all(tensor.is_contiguous() for tensor in held)


def adamw_step_pays(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *,
    step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, scale: float = 1.0,
) -> bool:  # fmt: skip
    return weight.is_cpu
