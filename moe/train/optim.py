"""The optimizers: AdamW or Adafactor for everything, or Muon for hidden matrices with AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the update of a matrix is its Nesterov momentum, brought
near the closest orthogonal matrix by five Newton-Schulz iterations. Experts are a batch of matrices, and matrices of
one shape are iterated together, in bfloat16 (which the iteration tolerates, four times faster on a CPU); the state is
float32, or bfloat16 stochastically rounded (moments.py), as AdamW's then is. A matrix that ranks hold in slices is
iterated whole, on one of them (parallel/whole.py).

B matrices, R rows, C columns.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...parallel.fsdp import own_parameters
from ...parallel.mesh import Mesh
from ...parallel.shard import ShardSpec
from ...parallel.whole import Whole
from ..shapes import is_hidden_matrix, is_router
from .adafactor import Adafactor
from .adamw import AdamW
from .config import OptimConfig
from .moments import CompactAdamW, Rounding
from .plain import PlainOptimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def build_optimizers(
    model: nn.Module,
    cfg: OptimConfig,
    shards: Mapping[str, ShardSpec] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    keep_zeros: bool = False,
) -> list[Optimizer]:
    """The optimizers of a model's parameters, each parameter in exactly one; `peak` of a group is its highest rate.

    Args:
        model: its `own_parameters` are moved.
        cfg: which optimizers, and their settings.
        shards: where each parameter lies in the global one; None = all are whole.
        seed: with `shards`, keys how bfloat16 states are rounded.
        mesh: the layout, when ranks hold matrices in slices. Collective then.
        keep_zeros: weights that are zero and have no gradient there do not move.
    """
    named = [(name, weight) for name, weight in own_parameters(model).items() if weight.requires_grad]
    hidden = [(n, w) for n, w in named if cfg.name == "muon" and is_hidden_matrix(n, w.ndim)]
    taken = {name for name, _ in hidden}
    by_decay: dict[float, list[nn.Parameter]] = {}
    for name, weight in named:
        if name not in taken:
            decays = weight.ndim >= 2 and not is_router(name)
            by_decay.setdefault(cfg.weight_decay if decays else 0.0, []).append(weight)
    groups = [{"params": w, "lr": cfg.lr, "peak": cfg.lr, "weight_decay": decay} for decay, w in by_decay.items()]
    if cfg.name == "adafactor":
        return [Adafactor(groups, lr=cfg.lr, whole=Whole(dict(named), shards, mesh))]
    betas, rounding = (cfg.beta1, cfg.beta2), None
    adamw: Optimizer
    if cfg.state_dtype == "bfloat16":
        rounding = Rounding(dict(named), shards, seed)
        adamw = CompactAdamW(groups, betas=betas, eps=cfg.eps, rounding=rounding)
    else:
        adamw = AdamW(groups, betas=betas, eps=cfg.eps, fused=True)
    if not hidden:
        return [adamw]
    whole = Whole(dict(hidden), shards, mesh)
    return [adamw, Muon(hidden, cfg.muon_lr, cfg.momentum, cfg.weight_decay, rounding, whole, keep_zeros)]


def set_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Every group's learning rate becomes `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


class Muon(PlainOptimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices [R, C] and stacks of them [E, R, C].

    The step is scaled by sqrt(max(1, fan_out / fan_in)), so that one learning rate suits wide and narrow matrices.

    Args:
        named: parameters and their names. A stack named `w_out` is stored [E, in, out], everything else [out, in].
        lr: peak learning rate.
        momentum: Nesterov momentum in [0, 1).
        weight_decay: decoupled decay, times the learning rate.
        rounding: holds the momentum in bfloat16; None = float32.
        whole: brings divided matrices together; None = none is divided.
        keep_zeros: do not move weights that are zero.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        rounding: Rounding | None = None,
        whole: Whole | None = None,
        keep_zeros: bool = False,
    ) -> None:
        self.whole, self.keep_zeros = whole or Whole(), keep_zeros
        shapes: dict[tuple[int, int, bool], list[nn.Parameter]] = {}
        for name, weight in named:
            flipped = weight.ndim == 3 and name.endswith("w_out")
            rows, columns = self.whole.shape(weight)[-2:]
            shapes.setdefault((rows, columns, flipped), []).append(weight)
        groups = []
        for (rows, columns, flipped), weights in shapes.items():
            ratio = columns / rows if flipped else rows / columns
            groups.append({"params": weights, "peak": lr, "scale": max(1.0, ratio) ** 0.5})
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.rounding, self.state_dtype = rounding, torch.bfloat16 if rounding else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            grads = {weight: weight.grad for weight in group["params"] if weight.grad is not None}
            ahead = {weight: self._look_ahead(weight, grad, group["momentum"]) for weight, grad in grads.items()}
            for weight, update in self.whole.own(_directions(self.whole.gather(ahead)), ahead).items():
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update * (weight != 0) if self.keep_zeros else update, alpha=-group["lr"] * group["scale"])

    def _look_ahead(self, weight: nn.Parameter, grad: Tensor, momentum: float) -> Tensor:
        """Update the momentum; the Nesterov direction in bfloat16, of the weight's shape."""
        state = self.state[weight]
        if not state:
            state.update(momentum=torch.zeros_like(weight, dtype=self.state_dtype), step=0)
        state["step"] += 1
        mean = state["momentum"].float().lerp_(grad.float(), 1 - momentum)
        if self.rounding is not None:
            self.rounding.store(weight, state["step"], {state["momentum"]: mean})
        return torch.lerp(grad.float(), mean, momentum).bfloat16()


def _directions(ahead: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The orthogonal directions of matrices and stacks of one [R, C], iterated as one batch."""
    if not ahead:
        return {}
    matrices = [some.reshape(-1, *some.shape[-2:]) for some in ahead.values()]
    updates = orthogonalize(torch.cat(matrices)).split([len(some) for some in matrices])
    return {weight: update.view_as(some) for (weight, some), update in zip(ahead.items(), updates, strict=True)}


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
