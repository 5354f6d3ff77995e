"""The native engine: DistributedDataParallel for the dense parameters, a sum over replicas for the experts.

Losses are sums divided by a global token count, so every reduction here is a plain SUM in float32 (float64 stays)
and nothing is divided. In a world of one there is no DDP and no communication.

    logits = engine.forward(tokens_T, positions_T, ctx)
    engine.backward(loss, last=True)       # last=False: accumulate, no gradient travels
    result = engine.step()                 # norm, vote, clip, optimizers; gradients are gone afterwards
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..gradients import clip_coefficient, expert_names, global_norm
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
        self.sharded = expert_names(model, shards)
        self._last = True
        self._wrapped: nn.Module = model
        if mesh.dense is not None:
            self._wrapped = self._replicate(mesh.dense.get_group())

    def _replicate(self, group: dist.ProcessGroup) -> DistributedDataParallel:
        """The model in DDP, experts left out.

        `find_unused_parameters`: a rank without tokens may leave parameters untouched, which must not hang the others;
        and DDP then keeps its first buckets, so a sum of more than two ranks has one order, resumed or not.
        """
        self.model._ddp_params_and_buffers_to_ignore = sorted(self.sharded)  # type: ignore[assignment]
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        with naming("start of data parallelism"):
            wrapped = DistributedDataParallel(
                self.model,
                process_group=group,
                broadcast_buffers=False,
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
        if last and self.mesh.expert is not None and self.mesh.edp_size > 1:
            group = self.mesh.expert.get_group("edp")
            with naming("sum of the expert gradients"):
                for name, parameter in self.model.named_parameters():
                    if name in self.sharded:
                        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                        _sum_in_float32(parameter.grad, group)

    def step(self) -> StepResult:
        """Vote, clip and step; the gradients are dropped either way. Collective."""
        grads = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        norm = global_norm(grads, self.sharded.__contains__, self.mesh)
        finite = math.isfinite(norm)
        coefficient = clip_coefficient(norm, self.clip) if finite else 0.0
        if finite:
            for _, grad in grads:
                if coefficient < 1.0:
                    grad.mul_(coefficient)
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return StepResult(norm, coefficient, finite)


def _sum_bucket(engine: NativeEngine, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: leave the bucket alone while accumulating, else SUM it; never divide."""
    buffer = bucket.buffer()
    if not engine._last:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done
    wide = _widen(buffer)
    work = dist.all_reduce(wide, group=engine.mesh.dense.get_group(), async_op=True)
    return work.get_future().then(lambda _: buffer if wide is buffer else buffer.copy_(wide))


def _sum_in_float32(grad: Tensor, group: dist.ProcessGroup) -> None:
    wide = _widen(grad)
    dist.all_reduce(wide, group=group)
    if wide is not grad:
        grad.copy_(wide)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
