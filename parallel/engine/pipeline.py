"""The pipeline engine: layers divided over ranks, micro-batches passed along by torch's pipelining schedules.

    gpipe    all forward passes, then all backward passes (Huang et al. 1811.06965)
    1f1b     a backward pass as soon as there is one to do (Narayanan et al. 2006.09503); with several stages a rank,
             interleaved (2104.04473)

Only x_TD travels, and its gradient back: the data are the same on all ranks of a pipeline, so each makes its own
contexts. Gradients are summed over replicas once the schedule is through, in flat pieces; there is no DDP.

T tokens held here, D width.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from ... import TurnoutError
from ..mesh import Mesh
from ..pipeline import Stage
from ..process import naming
from ..shard import ShardSpec
from .engine import Engine, Inputs, Loss, StepResult
from .scale import LossScale
from .update import clip_and_step, sum_replicas

EXCHANGE = "exchange between pipeline stages"


class PipelineEngine(Engine):
    """Trains the stages of a model that this rank holds.

    Args:
        model: already parallelized and cut down to its stages; `engine.model` is this very object.
        optimizers: stepped in order; set their learning rates through `param_groups`.
        mesh: the layout, with several pipeline ranks.
        shards: what `parallelize` returned.
        held: this rank's stages, number → layers, in order.
        width: D.
        schedule: the order of micro-batches.
        tied: parameters that the first and the last stage both hold.
        clip: largest gradient norm; None = no limit.
        dtype: of the forward pass under autocast; None = as the parameters are. float16 brings a `scale`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        mesh: Mesh,
        shards: Mapping[str, ShardSpec],
        held: Mapping[int, range],
        *,
        width: int,
        schedule: Literal["1f1b", "gpipe"] = "1f1b",
        tied: Collection[str] = (),
        clip: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.optimizers, self.mesh = model, list(optimizers), mesh
        self.clip, self.dtype, self.shards = clip, dtype, shards
        self.scale = LossScale() if dtype is torch.float16 else None
        self.total, self.width, self.schedule, self.tied = mesh.layout.pp * len(held), width, schedule, tied
        self.stages = {number: Stage(model, number, self.total - 1, layers) for number, layers in held.items()}
        self._given: list[tuple[Any, ...]] = []
        self._loss: Loss
        self._seen: Callable[[int], None] | None = None
        self._schedules: dict[tuple[int, int], Any] = {}

    def accumulate(self, count: int, inputs: Inputs, loss: Loss, seen: Callable[[int], None] | None = None) -> None:
        """As `Engine.accumulate`; every micro-batch has as many tokens, and `loss` is called on the last stage."""
        self._given, self._loss, self._seen = [inputs(micro) for micro in range(count)], loss, seen
        tokens = {len(given[0]) for given in self._given}
        assert len(tokens) == 1, f"micro-batches of {sorted(tokens)} tokens: what travels has one shape"
        key = count, tokens.pop()
        with naming(EXCHANGE), _unwrapped():
            if key not in self._schedules:
                self._schedules = {key: self._build(*key)}
            self._schedules[key].step(micro=torch.arange(count), target=torch.arange(count), return_outputs=False)
        self._given = []
        sum_replicas(dict(self.model.named_parameters()), self.shards, self.mesh, self.tied)

    def infer(self, *args: Any) -> Tensor | None:
        given, positions_A, ctx = args
        x_TD = None
        with naming(EXCHANGE):
            for number, stage in self.stages.items():
                x_TD = stage(given if stage.is_first else self._receive(number, len(given)), positions_A, ctx)
                if not stage.is_last:
                    dist.send(x_TD.contiguous(), group=self._group, group_dst=(number + 1) % self.mesh.layout.pp)
        return x_TD if stage.is_last else None

    def step(self) -> StepResult:
        return clip_and_step(self, lambda name: self.mesh.size(self.shards[name].along) * (1 + (name in self.tied)))

    @property
    def _group(self) -> dist.ProcessGroup:
        return self.mesh.group("pp")

    def _receive(self, number: int, tokens: int) -> Tensor:
        """x_TD of stage `number` - 1."""
        x_TD = self._traveller(tokens, self.mesh.device)
        dist.recv(x_TD, group=self._group, group_src=(number - 1) % self.mesh.layout.pp)
        return x_TD

    def _traveller(self, tokens: int, device: torch.device | str) -> Tensor:
        """Memory for x_TD: the residual stream has the parameters' dtype, under autocast too."""
        return torch.empty(tokens, self.width, dtype=next(self.model.parameters()).dtype, device=device)

    def _build(self, count: int, tokens: int) -> Any:
        """The schedule of `count` micro-batches of `tokens` tokens."""
        x_TD = self._traveller(tokens, "meta").requires_grad_()
        stages: list[Any] = [
            PipelineStage(
                _Scheduled(self, stage),
                number,
                self.total,
                self.mesh.device,
                input_args=() if stage.is_first else (x_TD,),
                output_args=(x_TD.sum() if stage.is_last else x_TD,),
                group=self._group,
            )
            for number, stage in self.stages.items()
        ]
        settings: dict[str, Any] = {"loss_fn": lambda loss, _: loss, "scale_grads": False}
        if len(stages) > 1:
            return ScheduleInterleaved1F1B(stages, count, **settings)
        kind = ScheduleGPipe if self.schedule == "gpipe" else Schedule1F1B
        return kind(stages[0], count, **settings)


class _Scheduled(nn.Module):
    """A stage as a schedule calls it: `micro` says which micro-batch, and the last stage returns its loss."""

    def __init__(self, engine: PipelineEngine, stage: Stage) -> None:
        super().__init__()
        self.engine, self.stage = engine, stage

    def forward(self, *x_TD: Tensor, micro: Tensor) -> Tensor:
        number, engine = int(micro), self.engine
        given, positions_A, ctx = engine._given[number]
        with engine.autocast():
            output: Tensor = self.stage(given if self.stage.is_first else x_TD[0], positions_A, ctx)
        if self.stage.is_last:
            output = engine._loss(number, output)
        if self.stage.number == max(engine.stages):
            engine._given[number] = ()
            if engine._seen is not None:
                engine._seen(number)
        return output


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Let out what a schedule's stage raised: torch wraps everything in RuntimeErrors of its own."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException = error
        while not isinstance(cause, TurnoutError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from cause.__cause__
