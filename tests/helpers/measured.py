"""What the real loop's step holds in memory on this rank, and what was foretold."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from turnout.launch.compose import compose
from turnout.moe.train.footprint import Footprint
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.fsdp import own
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.memory import Memory


def measure(run: str, words: list[str]) -> dict[str, tuple[int, int]]:
    """Bytes (measured, foretold): `lasting` weights and gradients, `states`, `kept` after a forward pass, `peak`.

    The peak is that of all micro-batches of a step, or of a pipeline's whole schedule, without what lasts.
    """
    trainer, held = start(run, words)
    count, engine = held.config.micro_batches(held.layout.dp), trainer.setup.engine
    weights = list(trainer.setup.model.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    if held.layout.pp == 1:
        _micro(trainer, 0).backward()  # from now on DDP's gradients are views of its buckets
    trainer.parts = {}
    lasting = [own(tensor) for weight in weights for tensor in (weight, weight.grad)]
    with Memory(lasting) as measured:
        if held.layout.pp > 1:
            engine.accumulate(count, trainer._inputs, trainer._loss)
            kept = held.casts + held.activations  # nobody can look in between
        else:
            for micro in range(count):
                loss = _micro(trainer, micro)
                kept = kept if micro else measured.living()
                loss.backward()
    step(trainer, count)
    return {
        "lasting": (sum(tensor.nbytes for tensor in lasting), held.weights + held.gradients),
        "states": (sum(tensor.nbytes for tensor in _states(engine.optimizers)), held.optimizer),
        "kept": (kept, held.casts + held.activations),
        "peak": (measured.peak, held.travelling + held.passing),
    }


def measure_zero(run: str, words: list[str]) -> dict[str, tuple[int, int]]:
    """As `measure` under DeepSpeed: `lasting` weights and states, `peak` beyond these with gradients and buffer."""
    trainer, held = start(run, words)
    count, engine = held.config.micro_batches(held.layout.dp), trainer.setup.engine
    step(trainer, count)
    flat = [*engine._zero.bit16_groups_flat, *engine._zero.single_partition_of_fp32_groups, *engine._experts]
    lasting = [*flat, *_states(engine._parts)]
    trainer.parts = {}
    with Memory(lasting) as measured:
        engine.accumulate(count, trainer._inputs, trainer._loss)
    rest = held.weights + held.optimizer
    return {
        "lasting": (sum(tensor.nbytes for tensor in lasting), rest),
        "peak": (measured.peak, held.total - rest),
    }


def start(run: str, words: list[str]) -> tuple[Trainer, Footprint]:
    """This rank of a run, ready to step, and what was foretold of it."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    experts = config.model.moe.num_experts if config.model.moe else None
    mesh = build_mesh(config.parallel, "cpu", experts)
    trainer = Trainer(config, Path(run), mesh, lambda: False)
    trainer.metrics.close()
    trainer.setup.model.train()
    return trainer, Footprint(config, mesh.layout, cpu=True, stage=mesh.place["pp"])


def _micro(trainer: Trainer, micro: int) -> Tensor:
    return trainer._loss(micro, trainer.setup.engine.forward(*trainer._inputs(micro)))


def step(trainer: Trainer, count: int) -> None:
    """One optimizer step of `count` micro-batches."""
    trainer.parts = {}
    trainer.setup.engine.accumulate(count, trainer._inputs, trainer._loss)
    trainer.setup.engine.step()


def _states(optimizers: list[torch.optim.Optimizer]) -> Iterator[Tensor]:
    kept = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
    return (value for value in kept if isinstance(value, Tensor))
