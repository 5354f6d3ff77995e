"""The native engine: DistributedDataParallel for what every rank holds, sums over replicas for what is divided.

In a world of one there is no DDP and no communication.

    engine.accumulate(count, inputs, loss)
    result = engine.step()
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..fsdp import own_parameters
from ..gradients import widen
from ..mesh import Mesh
from ..process import naming
from ..shard import ShardSpec
from .engine import DirectEngine, StepResult
from .scale import LossScale
from .update import clip_and_step


class NativeEngine(DirectEngine):
    """Trains `model` on all ranks of `mesh`.

    Args:
        model: already parallelized; `engine.model` is this very object (evaluate and save that one).
        optimizers: stepped in order; set their learning rates through `param_groups`.
        mesh: the layout.
        shards: what `parallelize` returned.
        clip: largest gradient norm; None = no limit.
        dtype: of the forward pass under autocast; None = as the parameters are. float16 brings a `scale`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        mesh: Mesh,
        shards: Mapping[str, ShardSpec],
        *,
        clip: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.optimizers, self.mesh = model, list(optimizers), mesh
        self.clip, self.dtype, self.shards = clip, dtype, shards
        self.parameters = own_parameters(model)
        self.divided = [name for name in self.parameters if shards[name].along != "stage"]
        self.scale = LossScale() if dtype is torch.float16 else None
        self._wrapped: nn.Module = model
        self._sum: _Sum | None = None
        if mesh.size("stage") > 1:
            self._wrapped = self._replicate()

    def _replicate(self) -> nn.Module:
        """The model in DDP, what is divided and buffers left out.

        `find_unused_parameters`: a rank without tokens may leave parameters untouched, which must not hang the others;
        and DDP then keeps its first buckets, so a sum over more than two ranks has one order, resumed or not.
        """
        whole = _Replicated(self.model, self.mesh.device, self.divided)
        self._sum = _Sum(self.mesh.group("stage"))
        with naming("start of data parallelism"):
            wrapped = DistributedDataParallel(
                whole,
                process_group=self._sum.group,
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
            )
        wrapped.register_comm_hook(self._sum, _sum_bucket)
        return wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with naming("forward pass"), self.autocast():
            return self._wrapped(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        if self._sum is not None:
            self._sum.due = last
        with naming("sum of the dense gradients"):
            loss.backward()
        if last:
            sum_divided(self.parameters, self.divided, self.shards, self.mesh)

    def step(self) -> StepResult:
        return clip_and_step(self, lambda name: self.mesh.size(self.shards[name].along))


class _Replicated(nn.Module):
    """The model, and one parameter that is never used: a search that finds none makes DDP warn in every run."""

    def __init__(self, model: nn.Module, device: torch.device, divided: Collection[str]) -> None:
        super().__init__()
        self.model = model
        ignored = [*divided, *(name for name, _ in model.named_buffers())]
        self._ddp_params_and_buffers_to_ignore = {f"model.{name}" for name in ignored}
        self.unused = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


@dataclass
class _Sum:
    """What DDP's hook knows: over whom to sum, and whether to. Not the engine, which DDP would keep alive for ever."""

    group: dist.ProcessGroup
    due: bool = True


def _sum_bucket(state: _Sum, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: leave the bucket alone while accumulating, else SUM it; never divide."""
    buffer = bucket.buffer()
    if not state.due:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done
    wide = widen(buffer)
    work = dist.all_reduce(wide, group=state.group, async_op=True)
    return work.get_future().then(lambda _: buffer if wide is buffer else buffer.copy_(wide))


def sum_divided(
    parameters: Mapping[str, nn.Parameter], divided: Collection[str], shards: Mapping[str, ShardSpec], mesh: Mesh
) -> None:
    """SUM the gradients of the parameters in `divided` over the ranks that hold the same slice. Collective.

    An expert that saw no token has a gradient of zeros, so that every layout decays and steps it alike.
    """
    with naming("sum of the divided gradients"):
        for name in divided:
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            if mesh.size(shards[name].along) > 1:
                wide = widen(parameter.grad)
                dist.all_reduce(wide, group=mesh.group(shards[name].along))
                if wide is not parameter.grad:
                    parameter.grad.copy_(wide)
