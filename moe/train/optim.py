"""The optimizers: AdamW or Adafactor for everything, or Muon for hidden matrices with AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the update of a matrix is its Nesterov momentum, brought
near the closest orthogonal matrix by five Newton-Schulz iterations. Experts are a batch of matrices, and matrices of
one shape are iterated together, in bfloat16 (which the iteration tolerates, four times faster on a CPU); the state is
float32.

B matrices, R rows, C columns.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..shapes import is_hidden_matrix, is_router
from .adafactor import Adafactor
from .config import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def build_optimizers(model: nn.Module, cfg: OptimConfig) -> list[Optimizer]:
    """The optimizers of a model's parameters, each parameter in exactly one; `peak` of a group is its highest rate."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    hidden = [(n, w) for n, w in named if cfg.name == "muon" and is_hidden_matrix(n, w.ndim)]
    taken = {name for name, _ in hidden}
    by_decay: dict[float, list[nn.Parameter]] = {}
    for name, weight in named:
        if name not in taken:
            decays = weight.ndim >= 2 and not is_router(name)
            by_decay.setdefault(cfg.weight_decay if decays else 0.0, []).append(weight)
    groups = [{"params": w, "lr": cfg.lr, "peak": cfg.lr, "weight_decay": decay} for decay, w in by_decay.items()]
    if cfg.name == "adafactor":
        return [Adafactor(groups, lr=cfg.lr)]
    adamw = AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    if not hidden:
        return [adamw]
    return [adamw, Muon(hidden, lr=cfg.muon_lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)]


def set_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Every group's learning rate becomes `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices [R, C] and stacks of them [E, R, C].

    The step is scaled by sqrt(max(1, fan_out / fan_in)), so that one learning rate suits wide and narrow matrices.

    Args:
        named: parameters and their names. A stack named `w_out` is stored [E, in, out], everything else [out, in].
        lr: peak learning rate.
        momentum: Nesterov momentum in [0, 1).
        weight_decay: decoupled decay, times the learning rate.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        shapes: dict[tuple[int, int, bool], list[nn.Parameter]] = {}
        for name, weight in named:
            flipped = weight.ndim == 3 and name.endswith("w_out")
            shapes.setdefault((*weight.shape[-2:], flipped), []).append(weight)
        groups = []
        for (rows, columns, flipped), weights in shapes.items():
            ratio = columns / rows if flipped else rows / columns
            groups.append({"params": weights, "peak": lr, "scale": max(1.0, ratio) ** 0.5})
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            moving = [(weight, weight.grad) for weight in group["params"] if weight.grad is not None]
            if not moving:
                continue
            weights = [weight for weight, _ in moving]
            stack_BRC = torch.cat([self._look_ahead(weight, grad, group["momentum"]) for weight, grad in moving])
            updates = orthogonalize(stack_BRC).split([weight.shape[:-2].numel() for weight in weights])
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * group["scale"])

    def _look_ahead(self, weight: nn.Parameter, grad: Tensor, momentum: float) -> Tensor:
        """Update the momentum; the Nesterov direction, as a batch of matrices in bfloat16."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight, dtype=torch.float32)
        state["momentum"].lerp_(grad.float(), 1 - momentum)
        ahead = torch.lerp(grad.float(), state["momentum"], momentum)
        return ahead.reshape(-1, *weight.shape[-2:]).bfloat16()


def orthogonalize(g_BRC: Tensor) -> Tensor:
    """Each matrix U S Vᵀ of the batch becomes about U Vᵀ: all singular values near 1 (between about 0.7 and 1.2).

    A quintic Newton-Schulz iteration after scaling by the Frobenius norm. A zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = g_BRC.shape[1] > g_BRC.shape[2]
    x_BRC = g_BRC.mT if tall else g_BRC
    x_BRC = x_BRC / (x_BRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram_BRR = x_BRC @ x_BRC.mT
        x_BRC = torch.baddbmm(x_BRC, torch.baddbmm(gram_BRR, gram_BRR, gram_BRR, beta=b, alpha=c), x_BRC, beta=a)
    return x_BRC.mT if tall else x_BRC
