"""What a run needs before its first step: data, model, engine, and the state it starts or resumes from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ... import CheckpointError, ConfigError, __version__
from ...configs.source import source_digest
from ...configs.typed import to_dict
from ...parallel import process
from ...parallel.apply import parallelize
from ...parallel.checkpoint import Checkpoint, latest, open_checkpoint
from ...parallel.checkpoint.writer import committed
from ...parallel.engine.deepspeed import DeepSpeedEngine
from ...parallel.engine.engine import Engine
from ...parallel.engine.fsdp import FsdpEngine
from ...parallel.engine.native import NativeEngine
from ...parallel.engine.zero3 import Zero3Engine
from ...parallel.fsdp import divide, own
from ...parallel.mesh import Mesh
from ...parallel.pipeline import keep_stages
from ...parallel.shard import ShardSpec
from ...parallel.stages import held
from ..config import ModelConfig
from ..data.mixture import Mixture
from ..data.rows import Rows
from ..data.spans import SpanRows
from ..data.stream import prepare, prepare_mix
from ..data.tokenizer import Tokenizer
from ..families.reading import Source, open_source, whole_shapes
from ..families.upcycle import Upcycled
from ..models.decoder import Decoder
from ..models.init import init_weights
from ..shapes import is_expert, is_router
from ..upcycle_config import UpcycleConfig
from . import state
from .config import RunConfig, flatten, identity
from .distill import LENT, Teacher, add_projection
from .narrow import narrow_gradients
from .optim import build_optimizers
from .recompute import recompute
from .zeros import count_zeros, kept

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A run that is ready to step.

    Attributes:
        identity: what its checkpoints depend on.
        teacher: who has a say beside the text.
        zeros: (zeros, numbers) of the matrices whose zeros stay.
    """

    tokenizer: Tokenizer
    rows: Rows
    model: Decoder
    shards: dict[str, ShardSpec]
    engine: Engine
    identity: dict[str, object]
    teacher: Teacher | None = None
    zeros: tuple[int, int] | None = None


def prepare_run(config: RunConfig, run: Path, mesh: Mesh) -> Setup:
    """Data (built by rank 0, then read by all), the model with its first weights, and its engine. Collective."""
    agree(flatten({"turnout": __version__, "code": source_digest(), "torch": torch.__version__, **to_dict(config)}))
    if mesh.rank == 0:
        read(config, run)
    process.barrier()
    tokenizer, rows = read(config, run)
    agree({"tokenizer": tokenizer.digest, "training data": rows.sha256})
    ends = tuple(sorted({*config.model.eos_token_ids, tokenizer.eos_id}))
    cfg = dataclasses.replace(config.model, eos_token_id=ends if len(ends) > 1 else tokenizer.eos_id)
    model, shards = build_model(cfg, config, mesh)
    if config.train.compile:
        from .compiled import compile_blocks  # imports the compiler

        compile_blocks(model)
    recompute(model, config.train.recompute)
    if mesh.device.type == "cpu" and narrow_gradients(config, mesh.layout):
        for name, weight in model.named_parameters():
            if is_expert(name):
                weight.grad_dtype = torch.bfloat16
    engine, zeros = build_engine(config, model, mesh, shards), None
    if config.train.keep_zeros:
        engine.keeps_zeros = kept(model)
        zeros = count_zeros(model, shards, mesh, config.train.init)
    return Setup(
        tokenizer=tokenizer,
        rows=rows,
        model=model,
        shards=shards,
        engine=engine,
        identity=identity(to_dict(config)),
        teacher=None if config.train.distill is None else Teacher(config, model, tokenizer, mesh),
        zeros=zeros,
    )


def read(config: RunConfig, run: Path) -> tuple[Tokenizer, Rows]:
    """The tokenizer and the training rows, built into the run's cache where they are not there yet."""
    data, train = config.data, config.train
    tokenizer, stream = prepare(data, run)
    if data.spans is not None and config.model.encoder is not None:
        marks = [tokenizer.sentinel_id(number) for number in range(data.spans.count(train.seq_len))]
        start = config.model.encoder.start_token_id
        return tokenizer, SpanRows(stream, train.seq_len, config.seed, data.spans, start, marks)
    if data.mix is None:
        return tokenizer, Rows(stream, train.seq_len, config.seed)
    streams, total = prepare_mix(data, run, tokenizer), train.global_batch * (train.steps or 1)
    return tokenizer, Mixture(streams, data.mix, train.seq_len, config.seed, total, train.global_batch)


def agree(mine: dict[str, Any]) -> None:
    """Check that every rank has the same settings, code and data. Collective.

    Raises:
        ConfigError: on every rank, naming the first thing that differs.
    """
    held = process.gather_json(mine)
    for rank, theirs in enumerate(held):
        for key in sorted(held[0].keys() | theirs.keys()):
            if theirs.get(key) != held[0].get(key):
                raise ConfigError(
                    f"{key} ({held[0].get(key)} on rank 0, {theirs.get(key)} on rank {rank}) must be the same on every "
                    "rank: start all of them from one frozen run and one installation"
                )


def build_model(cfg: ModelConfig, config: RunConfig, mesh: Mesh) -> tuple[Decoder, dict[str, ShardSpec]]:
    """This rank's part of the model, made on meta so that no rank ever holds all experts; drawn, or from train.init."""
    with torch.device("meta"):
        model = Decoder(cfg)
        add_projection(model, config.train.distill)
    shards = parallelize(model, mesh)
    if mesh.layout.pp > 1:
        keep_stages(model, stages(cfg, config, mesh), mesh.layout.pp * config.parallel.virtual - 1)
    if config.parallel.fsdp:
        shards = divide(model, model.all_blocks, mesh, shards, is_router, forward_dtype(config))
        model.to_empty(device=mesh.device)
    else:  # what follows is the same, without sympy, which takes as long to import as all of ours
        model._apply(lambda some: torch.empty(some.shape, dtype=some.dtype, device=mesh.device))
    if config.train.init is None:
        init_weights(model, config.seed, shards)
        return model, shards
    start_from(config.train.init, config.upcycle, model, shards)
    init_weights(model, config.seed, shards, LENT)
    return model, shards


@torch.no_grad()
def start_from(path: str, how: UpcycleConfig, model: Decoder, shards: Mapping[str, ShardSpec]) -> None:
    """Fill this rank's part of the model from a checkpoint, made sparse as `how` says: one whole tensor at a time.

    What only learning from a teacher needs stays as it is.

    Raises:
        ConfigError: the checkpoint has other tensors than the model. CheckpointError: it does not read.
    """
    with open_source(path) as dense:
        source: Source = dense if how.num_experts is None else Upcycled(dense, how)
        there = whole_shapes(source.cfg)
        for name, weight in model.state_dict().items():
            if name in LENT:
                continue
            if there.get(name) != shards[name].global_shape:
                raise ConfigError(
                    f"train.init ({path}) has no {name} of shape {shards[name].global_shape}: "
                    "start from a model of the same shape"
                )
            mine = own(weight)
            mine.copy_(shards[name].take(source.read(name), tuple(mine.shape)))


def stages(cfg: ModelConfig, config: RunConfig, mesh: Mesh) -> dict[int, range]:
    """The pipeline stages of this rank, number → layers."""
    return held(cfg.layers, mesh.layout.pp, config.parallel.virtual, mesh.place["pp"])


def build_engine(config: RunConfig, model: Decoder, mesh: Mesh, shards: dict[str, ShardSpec]) -> Engine:
    """The engine that `engine` names, over the optimizers that `optim` names."""
    optimizers = build_optimizers(model, config.optim, shards, config.seed, mesh, config.train.keep_zeros)
    clip = config.optim.clip
    if mesh.layout.pp > 1:
        from ...parallel.engine.pipeline import PipelineEngine  # imports a compiler's 80 MB

        return PipelineEngine(
            model, optimizers, mesh, shards, stages(model.cfg, config, mesh), width=model.cfg.width,
            schedule=config.parallel.schedule, tied=("embed.weight",) if model.cfg.tie_embeddings else (),
            clip=clip, dtype=forward_dtype(config),
        )  # fmt: skip
    dtype = forward_dtype(config)
    if config.engine == "deepspeed" and config.parallel.zero == 3:
        return Zero3Engine(model, optimizers, mesh, shards, units=model.blocks, clip=clip, dtype=dtype)
    if config.engine == "deepspeed":
        return DeepSpeedEngine(model, optimizers, mesh, shards, clip=clip, stage=config.parallel.zero, dtype=dtype)
    engine = FsdpEngine if config.parallel.fsdp else NativeEngine
    return engine(model, optimizers, mesh, shards, clip=clip, dtype=dtype)


def forward_dtype(config: RunConfig) -> torch.dtype | None:
    """Of the forward pass under autocast; None = as the parameters are."""
    return None if config.train.dtype == "float32" else getattr(torch, config.train.dtype)


def resume(config: RunConfig, run: Path, setup: Setup) -> tuple[state.Progress, Path | None]:
    """Fill model and optimizers from the checkpoint that `train.resume` means: where it stands, and its directory.

    Without one it is the run's beginning, and None. Collective.

    Raises:
        CheckpointError: `train.resume` names a place without a checkpoint that verifies.
        ConfigError: the checkpoint is of another model, data, seed or batch, or older than one of this very run.
    """
    wanted = config.train.resume
    checkpoint = find_checkpoint(run, wanted) if wanted else None
    if checkpoint is None:
        return state.Progress(), None
    return load(checkpoint, setup), checkpoint.path


def load(checkpoint: Checkpoint, setup: Setup) -> state.Progress:
    """Fill model and optimizers from a checkpoint, and say where it stands. Collective.

    Raises:
        ConfigError: the checkpoint is of another model, data, seed or batch. CheckpointError: it does not fit.
    """
    progress = state.from_meta(checkpoint.meta, setup.identity, setup.tokenizer.digest)
    with setup.engine.whole():
        state.restore(checkpoint, setup.model, setup.engine.optimizers, setup.shards)
        setup.engine.scatter_state()
    if (scale := setup.engine.scale) is not None and progress.loss_scale is not None:
        scale.factor, scale.good = progress.loss_scale, progress.good_steps
    return progress


def find_checkpoint(run: Path, wanted: bool | str) -> Checkpoint | None:
    """The checkpoint to go on from: the run's newest (None without any), or the one at a run or checkpoint path."""
    if wanted is True:
        return latest(run / CHECKPOINTS)
    path = Path(str(wanted))
    found = open_checkpoint(path) if path.name.startswith("step-") else latest(path / CHECKPOINTS)
    if found is None:
        raise CheckpointError(f"train.resume ({wanted}) holds no checkpoint: name a run that saved one")
    later = [step for step, _ in committed(run / CHECKPOINTS) if step > found.step]
    if later:
        raise ConfigError(
            f"train.resume ({wanted}) is step {found.step} and {run} has saved step {later[-1]}: "
            "use train.resume=true to go on from there, or another run=DIR"
        )
    return found
