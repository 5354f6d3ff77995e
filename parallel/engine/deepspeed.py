"""The DeepSpeed engine: ZeRO (Rajbhandari et al. 1910.02054) for the dense parameters, same surface as `native`.

DeepSpeed cuts the optimizer states of the dense parameters (ZeRO-1), or their gradients too (ZeRO-2), into one piece a
rank; ZeRO-3 is `zero3.py`. The experts are spread over ranks
already; their gradients are summed over the replicas and stepped here, as in the native engine. What DeepSpeed would
do to the numbers is switched off: it sums and does not average, its clip is off, and ours sees every parameter once.

ZeRO-2 sums gradients in the order in which the backward pass makes them, so every rank must have tokens: without any, a
rank makes them in another order. `turnout train` deals rows out evenly.

Parameters are float32, the forward pass may be bfloat16 under autocast. One elementwise optimizer (AdamW, Adam, SGD):
ZeRO updates flat pieces, so it can not hold matrices.
"""

import importlib
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import ConfigError
from ..gradients import clip_coefficient, global_norm
from ..mesh import Mesh
from ..process import naming
from ..shard import ShardSpec
from .engine import DirectEngine, StepResult
from .native import sum_divided

ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def settings(stage: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """DeepSpeed's JSON configuration: ZeRO, plain sums in float32, no clip, no loss scaling, autocast to `dtype`.

    Stage 3 has means for sums. It keeps no parameter whole because it is small, and gathers none before its time.
    """
    zero: dict[str, Any] = {"compute_grad_norm": False}
    if stage == 3:
        zero = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    autocast = {"enabled": True, "dtype": str(dtype).removeprefix("torch."), "lower_precision_safe_modules": []}
    return {
        "train_micro_batch_size_per_gpu": 1,  # only scales DeepSpeed's own counters
        "gradient_accumulation_steps": 1,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False, **zero},
        "steps_per_print": None,
        **({} if dtype is None else {"torch_autocast": autocast}),
    }


class ZeroEngine(DirectEngine):
    """What the stages share: DeepSpeed's forward pass, and a step with our norm, vote and clip.

    `_parts` are the optimizers that step in place of `optimizers[0]`, ZeRO's first.
    """

    _engine: Any
    _zero: Any
    _parts: list[torch.optim.Optimizer]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with naming("forward pass"):
            return self._engine(*args, **kwargs)

    def step(self) -> StepResult:
        grads = list(self._owned_gradients())
        norm = global_norm(grads, self.mesh.device)
        finite = math.isfinite(norm)
        coefficient = clip_coefficient(norm, self.clip) if finite else 0.0
        if finite:
            if coefficient < 1.0:
                for grad, _ in grads:
                    grad.mul_(coefficient)
            _follow(self.optimizers[0], *self._parts)
            with naming("step of ZeRO"):
                self._engine.step()
            for optimizer in self._parts[1:]:
                optimizer.step()
        else:
            self._forget_gradients()
        self.model.zero_grad(set_to_none=True)
        return StepResult(norm, coefficient, finite)

    @abstractmethod
    def _owned_gradients(self) -> Iterable[tuple[Tensor, int]]:
        """The reduced gradients that this rank updates, with their number of replicas: ZeRO's pieces have none."""

    @abstractmethod
    def _forget_gradients(self) -> None:
        """Have ZeRO drop its pieces of the gradients."""


class DeepSpeedEngine(ZeroEngine):
    """Trains `model` with ZeRO-1 or ZeRO-2 (`stage`); else as `NativeEngine`. Needs at least 2 ranks.

    The learning rates are read from `optimizers[0].param_groups` at every step; its states live elsewhere.

    Raises:
        ConfigError: DeepSpeed is not installed, or it can not train this (world of one, dtype, optimizer).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        mesh: Mesh,
        shards: Mapping[str, ShardSpec],
        *,
        clip: float | None = None,
        stage: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_trainable(model, optimizers, mesh, dtype)
        self.model, self.optimizers, self.mesh, self.clip = model, list(optimizers), mesh, clip
        self.dtype, self.shards, self.parameters = dtype, shards, dict(model.named_parameters())
        parameters = self.parameters
        self.divided = [name for name in parameters if shards[name].along != "stage"]
        self._experts = [parameters[name] for name in self.divided]
        self._dense = [p for name, p in parameters.items() if name not in self.divided and p.requires_grad]
        self._parts = [part_of(self.optimizers[0], some) for some in (self._dense, self._experts) if some]
        self._engine = initialize(model, self._parts[0], mesh, self._experts, settings(stage, dtype))
        self._zero = self._engine.optimizer

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        for parameter in self._dense:  # ZeRO must reduce the same parameters on every rank, also on one without tokens
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._engine.set_gradient_accumulation_boundary(last)
        with naming("sum of the dense gradients"):
            self._engine.backward(loss, scale_wrt_gas=False)
        if last:
            sum_divided(self.parameters, self.divided, self.shards, self.mesh)

    def gather_state(self) -> None:
        """Make `optimizers[0].state[parameter]` current, from ZeRO's pieces and the experts' states. Collective."""
        get = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        state = self.optimizers[0].state
        for optimizer in self._parts[1:]:
            state.update({parameter: dict(optimizer.state[parameter]) for parameter in self._experts})
        self._link_states()
        flat, pieces = next(iter(self._parts[0].state.items()))
        with naming("gathering of ZeRO's states"):
            for parameter in self._dense:
                state[parameter] = {
                    key: get(parameter, key) if piece.shape == flat.shape else piece.clone()
                    for key, piece in pieces.items()
                }

    def scatter_state(self) -> None:
        """Take over what was written into the model and `optimizers[0].state`. Every rank keeps its pieces."""
        put = importlib.import_module("deepspeed.utils").safe_set_full_optimizer_state
        state = self.optimizers[0].state
        for optimizer in self._parts[1:]:
            optimizer.state.update({parameter: dict(state[parameter]) for parameter in self._experts})
        example, dense = state[self._dense[0]], self._parts[0]
        for flat in (p for group in dense.param_groups for p in group["params"]):
            dense.state[flat] = {
                key: torch.zeros_like(flat) if value.shape == self._dense[0].shape else value.clone()
                for key, value in example.items()
            }
        self._link_states()
        for parameter in self._dense:
            for key, value in state[parameter].items():
                if value.shape == parameter.shape:
                    put(parameter, value, key)
        self._zero.refresh_fp32_params()

    def _link_states(self) -> None:
        """Let DeepSpeed find each parameter's states: it looks once, when only its first group may have stepped."""
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _forget_gradients(self) -> None:
        self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)

    def _owned_gradients(self) -> Iterator[tuple[Tensor, int]]:
        for pieces in self._zero.averaged_gradients.values():
            for piece in pieces:
                yield piece, 1
        for parameter in self._experts:
            if parameter.grad is not None:
                yield parameter.grad, self.mesh.edp_size


def part_of(source: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """An optimizer like `source` for some of its parameters; each group remembers which one it came from."""
    wanted = {id(p) for p in parameters}
    groups = [
        {**group, "source": index, "params": some}
        for index, group in enumerate(source.param_groups)
        if (some := [p for p in group["params"] if id(p) in wanted])
    ]
    make: Callable[..., torch.optim.Optimizer] = type(source)
    return make(groups)


def _follow(source: torch.optim.Optimizer, *parts: torch.optim.Optimizer) -> None:
    """Give the parts the present learning rate and other settings of their source."""
    for group in (group for part in parts for group in part.param_groups):
        settings_now = source.param_groups[group["source"]]
        group.update({key: value for key, value in settings_now.items() if key != "params"})


def check_trainable(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], mesh: Mesh, dtype: torch.dtype | None
) -> None:
    if mesh.world == 1:
        raise ConfigError("engine (deepspeed) needs at least 2 ranks: use engine=native on one rank")
    if len(optimizers) != 1 or not isinstance(optimizers[0], ELEMENTWISE):
        names = "+".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ConfigError(f"optim ({names}) can not run in ZeRO's flat pieces: use optim.name=adamw or engine=native")
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ConfigError("the parameters' dtype must be float32 for engine=deepspeed: use engine=native")
    if dtype not in (None, torch.bfloat16):
        raise ConfigError(f"dtype ({dtype}) can not be autocast to under ZeRO: use bfloat16 or engine=native")


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, experts: Sequence[Any], config: dict[str, Any]
) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError("engine (deepspeed) needs the package: pip install 'turnout[deepspeed]'") from error
    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != mesh.device.type:
        raise ConfigError(
            f"DS_ACCELERATOR ({chosen}) must be the ranks' device: set DS_ACCELERATOR={mesh.device.type} first"
        )
    # The shared-memory all-reduce for CPUs compiles for a minute and leaves a stale lock when killed: gloo does it too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups = importlib.import_module("deepspeed.utils.groups")
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    if experts:
        groups._create_expert_and_data_parallel(mesh.ep_size)
        for parameter in experts:
            parameter.allreduce, parameter.group_name = False, f"ep_size_{mesh.ep_size}"
    with naming("start of DeepSpeed"):
        engine = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=_Topology(mesh), dist_init_required=False
        )[0]
    # An older release ignores the setting and would divide by the ranks.
    if config["gradient_allreduce_op"] == "sum" and engine.gradient_average:
        raise ConfigError(f"deepspeed ({deepspeed.__version__}) can not sum gradients: install deepspeed>=0.19.8")
    return engine


class _Topology:
    """What DeepSpeed asks about the ranks. Its own groups would wait half an hour for a lost peer; ours do not."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("stage")

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp_size

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0
