"""What the real loop's first micro-batch holds in memory on this rank, and what was foretold."""

from pathlib import Path

import torch

from turnout.launch.compose import compose
from turnout.moe.train.footprint import Footprint
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.memory import Memory


def measure(run: str, words: list[str]) -> dict[str, tuple[int, int]]:
    """Bytes (measured, foretold): `lasting` weights, gradients and states, `kept` after a forward pass, `peak`.

    The peak is that of a forward and a backward pass, or of a pipeline's whole schedule, without what lasts.
    """
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    experts = config.model.moe.num_experts if config.model.moe else None
    mesh = build_mesh(config.parallel, "cpu", experts)
    trainer = Trainer(config, Path(run), mesh, lambda: False)
    model, engine = trainer.setup.model, trainer.setup.engine
    model.train()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    lasting = [*model.parameters(), *(weight.grad for weight in model.parameters())]
    held = Footprint(config, mesh.layout, cpu=True, stage=mesh.place["pp"])
    with Memory(lasting) as measured:
        if mesh.layout.pp > 1:
            engine.accumulate(config.micro_batches(mesh.layout.dp), trainer._inputs, trainer._loss)
            kept = held.casts + held.activations  # nobody can look in between
        else:
            loss = trainer._loss(0, engine.forward(*trainer._inputs(0)))
            kept = measured.living()
            loss.backward()
    trainer.metrics.close()
    rest = held.weights + held.gradients + held.optimizer
    return {
        "lasting": (sum(tensor.nbytes for tensor in lasting), held.weights + held.gradients),
        "kept": (kept, held.casts + held.activations),
        "peak": (measured.peak, held.total - rest),
    }
