"""The native engine: DistributedDataParallel for the dense parameters, a sum over replicas for the experts.

Losses are sums divided by a global token count, so every reduction here is a plain SUM in float32 (float64 stays)
and nothing is divided. In a world of one there is no DDP and no communication.

    logits = engine.forward(tokens_T, positions_T, ctx)
    engine.backward(loss, last=True)       # last=False: accumulate, no gradient travels
    result = engine.step()                 # norm, vote, clip, optimizers; gradients are gone afterwards
    engine.gather_state()                  # before a checkpoint reads the optimizers' states
    engine.scatter_state()                 # after a checkpoint filled them and the model
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..gradients import clip_coefficient, global_norm, sharded_names
from ..mesh import Mesh
from ..process import naming
from ..shard import ShardSpec


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        grad_norm: L2 norm of the global batch's gradient, before the clip.
        clip: what the gradients were multiplied by.
        finite: False when a gradient of any rank was not; then no parameter moved on any rank.
    """

    grad_norm: float
    clip: float
    finite: bool


class NativeEngine:
    """Trains `model` on all ranks of `mesh`.

    Args:
        model: already parallelized; `engine.model` is this very object (evaluate and save that one).
        optimizers: stepped in order; set their learning rates through `param_groups`.
        mesh: the layout.
        shards: what `parallelize` returned.
        clip: largest gradient norm; None = no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        mesh: Mesh,
        shards: Mapping[str, ShardSpec],
        *,
        clip: float | None = None,
    ) -> None:
        self.model, self.optimizers, self.mesh, self.clip = model, list(optimizers), mesh, clip
        self.sharded = sharded_names(model, shards)
        self._last = True
        self._wrapped: nn.Module = model
        if mesh.dense is not None:
            self._wrapped = self._replicate()

    def _replicate(self) -> DistributedDataParallel:
        """The model in DDP, experts and buffers left out.

        `find_unused_parameters`: a rank without tokens may leave parameters untouched, which must not hang the others;
        and DDP then keeps its first buckets, so a sum over more than two ranks has one order, resumed or not.
        """
        whole = _Replicated(self.model, self.mesh.device, self.sharded)
        with naming("start of data parallelism"):
            wrapped = DistributedDataParallel(
                whole,
                process_group=self.mesh.group("dp"),
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
            )
        wrapped.register_comm_hook(self, _sum_bucket)
        return wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, prepared for `backward`; every loss must derive from what it returns."""
        with naming("forward pass"):
            return self._wrapped(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add this micro-batch's gradients; with `last`, sum them over the ranks (collective).

        Raises:
            PeerError: a peer died or hangs.
        """
        self._last = last
        with naming("sum of the dense gradients"):
            loss.backward()
        if last:
            sum_expert_gradients(self.model, self.sharded, self.mesh)

    def step(self) -> StepResult:
        """Vote, clip and step; the gradients are dropped either way. Collective."""
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        replicas = {name: self.mesh.edp_size if name in self.sharded else self.mesh.world for name in grads}
        norm = global_norm(((grad, replicas[name]) for name, grad in grads.items()), self.mesh.device)
        finite = math.isfinite(norm)
        coefficient = clip_coefficient(norm, self.clip) if finite else 0.0
        if finite:
            for grad in grads.values():
                if coefficient < 1.0:
                    grad.mul_(coefficient)
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return StepResult(norm, coefficient, finite)

    def gather_state(self) -> None:
        """Make `optimizers[i].state[parameter]` current: it always is."""

    def scatter_state(self) -> None:
        """Take over what was written into the model and `optimizers[i].state`: nothing is held elsewhere."""


class _Replicated(nn.Module):
    """The model, and one parameter that is never used: a search that finds none makes DDP warn in every run."""

    def __init__(self, model: nn.Module, device: torch.device, sharded: Collection[str]) -> None:
        super().__init__()
        self.model = model
        ignored = [*sharded, *(name for name, _ in model.named_buffers())]
        self._ddp_params_and_buffers_to_ignore = {f"model.{name}" for name in ignored}
        self.unused = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _sum_bucket(engine: NativeEngine, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: leave the bucket alone while accumulating, else SUM it; never divide."""
    buffer = bucket.buffer()
    if not engine._last:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done
    wide = _widen(buffer)
    work = dist.all_reduce(wide, group=engine.mesh.group("dp"), async_op=True)
    return work.get_future().then(lambda _: buffer if wide is buffer else buffer.copy_(wide))


def sum_expert_gradients(model: nn.Module, sharded: Collection[str], mesh: Mesh) -> None:
    """SUM the gradients of the parameters in `sharded` over the ranks that hold the same experts. Collective.

    An expert that saw no token has a gradient of zeros, so that every layout decays and steps it alike.
    """
    with naming("sum of the expert gradients"):
        for name, parameter in model.named_parameters():
            if name in sharded:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                wide = _widen(grad)
                if mesh.edp_size > 1:
                    dist.all_reduce(wide, group=mesh.group("edp"))
                parameter.grad = grad if wide is grad else grad.copy_(wide)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
