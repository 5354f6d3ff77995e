"""What an engine computes with, put together and made to fit: scheduler, blocks, KV cache, model runner, executor."""

from collections.abc import Callable
from dataclasses import replace

import torch

from .. import ConfigError
from ..configs.typed import check, digest
from ..kernels.cpp.build import library
from ..moe.layers.semi_structured import check_device, skip_zeros
from ..moe.models.decoder import Decoder
from ..parallel.config import Layout
from .config import EngineConfig
from .core.replicas import Replicas
from .core.scheduler import Scheduler
from .pool import block_manager
from .ranks import Ranks
from .run.executor import Executor
from .run.experts import check_routing
from .run.free import free_memory
from .run.graphs import GraphBuckets
from .run.memory import plan_memory
from .run.runner import ModelRunner


class Machine:
    """The parts of one engine, built from the settings; what these leave open is resolved here.

    Args:
        model, config, clock, ranks: as `Engine` has them; with `semi_structured` layers of the model are replaced.

    Attributes:
        config: resolved: `max_model_len` and `num_blocks` are numbers.
        memory: what weights, the worst step and the KV cache take.
        blocks: the first replica's.

    Raises:
        ConfigError: settings that do not fit the model or the memory.
    """

    def __init__(
        self, model: Decoder, config: EngineConfig, clock: Callable[[], float], ranks: Ranks | None = None
    ) -> None:
        device, dtype = model.device, model.dtype
        length = _check(model, config)
        layout = Layout(dp=1, ep=1, edp=1) if ranks is None else ranks.mesh.layout
        if config.semi_structured:
            _skip_zeros(model, layout.tp)
        held = sum(part.nbytes for part in model.state_dict().values())
        free = free_memory(device) // (1 if ranks is None else ranks.neighbours)
        plan = plan_memory(model.cfg, config, length, dtype, held, free, device.type, layout.ep, layout.tp, layout.dp)
        self.memory = plan if ranks is None else ranks.agree(plan)
        self.config = replace(config, max_model_len=length, num_blocks=self.memory.kv.num_blocks)
        width, encoder = -(-length // config.block_size), model.encoder is not None
        buckets = GraphBuckets(config.graph_buckets, width, device, encoder=encoder)
        runner = ModelRunner if ranks is None else ranks.runner
        self.runner = runner(model, self.memory.kv, config.moe_capacity, buckets, config.form)
        fingerprint = f"{digest(model.cfg)} {dtype} {self.memory.kv.dtype}".encode()
        pools = [block_manager(model.cfg, self.config, fingerprint) for _ in range(layout.dp)]
        self.blocks = pools[0]
        replicas = [Scheduler(self.config, blocks, clock) for blocks in pools]
        self.scheduler: Scheduler | Replicas = replicas[0] if ranks is None else Replicas(replicas)
        overlap = device.type == "cuda" if config.overlap is None else config.overlap
        executor = Executor if ranks is None else ranks.executor
        self.executor = executor(self.runner.execute, overlap=overlap)


def _check(model: Decoder, config: EngineConfig) -> int:
    """The longest sequence, if the settings fit the model."""
    check_routing(model.cfg, config.moe_capacity)
    longest, device = model.cfg.max_seq_len, model.device
    if config.deterministic and device.type != "cpu":
        rule = f"has kernels for a CPU only, and the model is on {device}"
        raise ConfigError(f"deterministic (true) {rule}: use device=cpu, or deterministic=false")
    _check_kernels(config.kernels, device)
    length = config.max_model_len or longest
    if length > longest:
        raise ConfigError(f"max_model_len ({length}) must not exceed the model's max_seq_len: use {longest}")
    return length


def _skip_zeros(model: Decoder, tp: int) -> None:
    """What `semi_structured` asks for, where it can be had."""
    rule = f"needs whole matrices, and parallel.tp ({tp}) divides them"
    check(tp == 1, "semi_structured", "true", rule, "use parallel.tp=1")
    capability = torch.cuda.get_device_capability(model.device) if model.device.type == "cuda" else (0, 0)
    check_device(model.device, model.dtype, capability)
    skip_zeros(model)


def _check_kernels(kernels: str, device: torch.device) -> None:
    """Refuse a form that can not run here: every operation would quietly take another."""
    fix = "leave kernels at auto"
    if kernels == "cpp" and device.type != "cpu":
        raise ConfigError(f"kernels (cpp) are for a CPU only, and the model is on {device}: {fix}")
    if kernels == "cpp" and library() is None:
        raise ConfigError(f"kernels (cpp) can not be built here, the warning before says why: {fix}")
    if kernels == "triton" and device.type == "cpu" and not _interpreted():
        raise ConfigError(f"kernels (triton) need a GPU, and the model is on {device}: {fix}")


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    try:
        from ..kernels.triton.interpreter import active
    except ImportError:
        return False
    return active()
