"""AdamW (Loshchilov & Hutter 1711.05101, algorithm 2), of one parameter and in place.

g ← scale · grad    m ← β1 m + (1 - β1) g    s ← β2 s + (1 - β2) g²
w ← (1 - lr · decay) w - lr · m / (1 - β1ᵗ) / (√(s / (1 - β2ᵗ)) + ε)
"""

from torch import Tensor


def adamw_step(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *,
    step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, scale: float = 1.0,
) -> None:  # fmt: skip
    beta1, beta2 = betas
    grad = grad.to(weight.dtype) * scale
    mean.lerp_(grad, 1 - beta1)
    square.lerp_(grad * grad, 1 - beta2)
    root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    weight.mul_(1 - lr * decay).addcdiv_(mean, root, value=-lr / (1 - beta1**step))
