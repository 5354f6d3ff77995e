"""A run's whole state as named tensors and plain JSON, and back.

Tensors are named `model/<parameter or buffer>` and `optim/<parameter>/<key>`, each with the place of this rank's slice
in the global tensor, so any layout can load what another saved; a dense SwiGLU's input matrix [2F, D] lies there as
[2, F, D], because gates and up projection are divided alike. The JSON holds the rest: step, cursor, counters, identity.
Every random number of a run is keyed by (seed, step, layer, token index): step and seed ARE the random streams.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import ConfigError
from ...configs.typed import build
from ...parallel.checkpoint import Checkpoint
from ...parallel.checkpoint import restore as fill
from ...parallel.fsdp import own, own_parameters
from ...parallel.shard import ShardSpec
from ..config import ModelConfig
from ..data.rows import Cursor
from ..models.decoder import Decoder
from .adafactor import Adafactor, state_shapes
from .adamw import AdamW
from .moments import CompactAdamW
from .optim import Muon

STATE_KEYS: Mapping[type, tuple[str, ...]] = {
    AdamW: ("exp_avg", "exp_avg_sq"),
    CompactAdamW: ("exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}
Named = dict[str, tuple[Tensor, ShardSpec]]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    Args:
        step: optimizer steps done.
        cursor: rows consumed, in the global order.
        tokens: valid target tokens seen.
        seconds: trained so far, over all parts of the run.
        wandb_id: wandb's name for the run.
        losses: of the last steps, oldest first, where spikes are looked for.
        rewinds: how often the run went back after a spike.
        loss_scale: the factor, of a run in float16.
        good_steps: finite steps in a row at it.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    seconds: float = 0.0
    wandb_id: str | None = None
    losses: tuple[float, ...] = ()
    rewinds: int = 0
    loss_scale: float | None = None
    good_steps: int = 0


def tensors(model: nn.Module, optimizers: Sequence[Optimizer], shards: Mapping[str, ShardSpec]) -> Named:
    """Every tensor of the run under its name, with its place in the global one. The optimizers must have stepped."""
    named: Named = {f"model/{name}": _block(own(tensor), shards[name]) for name, tensor in model.state_dict().items()}
    for name, weight, optimizer in _owned(model, optimizers):
        whole, begin = (_shapes(optimizer, place) for place in (shards[name].global_shape, shards[name].offset))
        if isinstance(optimizer, Adafactor):
            held = optimizer.whole.shape(weight)
            assert held[-2:] == shards[name].global_shape[-2:], "means over a part of a matrix"
            if held == shards[name].global_shape:
                begin = {key: (0,) * len(shape) for key, shape in whole.items()}
        for key in whole:
            parts = shards[name].parts if whole[key] == shards[name].global_shape else 1
            place = ShardSpec(whole[key], begin[key], parts=parts)
            named[f"optim/{name}/{key}"] = _block(optimizer.state[weight][key], place)
    return named


def whole_model(checkpoint: Checkpoint, cfg: ModelConfig) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a checkpoint's model, whole and in its own shape, on the CPU."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(cfg).state_dict().items()}
    return {name: checkpoint.read_all(f"model/{name}").view(shape) for name, shape in shapes.items()}


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[Optimizer], shards: Mapping[str, ShardSpec]
) -> None:
    """Fill model and optimizers in place with this rank's slices. Collective.

    Raises:
        CheckpointError: the checkpoint has other tensors than the run, or other shapes.
    """
    for _, weight, optimizer in _owned(model, optimizers):
        shape = optimizer.whole.shape(weight) if isinstance(optimizer, Adafactor) else tuple(weight.shape)
        shapes, dtype = _shapes(optimizer, shape), getattr(optimizer, "state_dtype", torch.float32)
        state: dict[str, Any] = {key: weight.new_zeros(shape, dtype=dtype) for key, shape in shapes.items()}
        state["step"] = checkpoint.step
        if isinstance(optimizer, AdamW):
            state["step"] = torch.tensor(float(checkpoint.step), device=weight.device)
        optimizer.state[weight] = state
    fill(checkpoint, tensors(model, optimizers, shards))


def to_meta(progress: Progress, identity: Mapping[str, Any], tokenizer: str) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {**asdict(progress), "identity": dict(identity), "tokenizer": tokenizer}


def from_meta(meta: Mapping[str, Any], identity: Mapping[str, Any], tokenizer: str) -> Progress:
    """Where the checkpoint stands, after checking that it is of the same run.

    Raises:
        ConfigError: model, data, seed, optimizer or batch differ from those that wrote it; the first is named.
    """
    then = {**meta["identity"], "tokenizer": meta["tokenizer"]}
    now = {**identity, "tokenizer": tokenizer}
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"{key} ({now.get(key)}) was {then.get(key)} when the checkpoint was written and can not change on "
                "resume: set it back, or start a new run with train.init"
            )
    known = {key: meta[key] for key in Progress.__dataclass_fields__ if key in meta}
    return build(Progress, known)


def _block(tensor: Tensor, place: ShardSpec) -> tuple[Tensor, ShardSpec]:
    """A tensor as one block of the global one: a view."""
    return tensor.view(place.unfold(tuple(tensor.shape))), place.block


def _shapes(optimizer: Optimizer, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """State key → shape (or offset) of that tensor, from the parameter's."""
    if isinstance(optimizer, Adafactor):
        return state_shapes(shape)
    return dict.fromkeys(STATE_KEYS[type(optimizer)], shape)


def _owned(model: nn.Module, optimizers: Sequence[Optimizer]) -> Any:
    """(name, parameter, its optimizer), in the optimizers' order, for every state that this rank has."""
    names = {weight: name for name, weight in own_parameters(model).items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if not isinstance(optimizer, Adafactor) or optimizer.whole.here(weight):
                    yield names[weight], weight, optimizer
