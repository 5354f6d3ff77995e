"""Training with batches that go wrong on the last rank, and with kills that leave nothing behind but the disk.

outcome = train(str(run), words, {3: math.nan})          # the logits of the fourth global batch, times NaN
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from turnout import NonFiniteError
from turnout.launch.compose import compose
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh


class Killed(BaseException):
    """Raised at a step boundary: nothing is saved after it."""


def train(
    run: str,
    words: list[str],
    factors: Mapping[int, float],
    kill_after: int | None = None,
    jump: tuple[int, int] | None = None,
    grow_after: int | None = None,
) -> str:
    """Train as this rank of however many there are.

    Args:
        factors: global batch → what the last rank's logits are multiplied by whenever it is read in training.
        kill_after: die after so many attempted steps.
        jump: (step, global batch): when `step` steps are done, read on at that batch.
        grow_after: good steps that double the loss scale of a run in float16.

    Returns:
        "done", "killed", or the error's text.
    """
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    mesh = build_mesh(config.parallel, "cpu", config.model.moe.num_experts if config.model.moe else None)
    attempts = iter(range(10**9))

    def boundary() -> bool:
        if next(attempts) == kill_after:
            raise Killed
        if jump is not None and trainer.now.step == jump[0]:
            cursor = replace(trainer.now.cursor, row=jump[1] * config.train.global_batch)
            trainer.now = replace(trainer.now, cursor=cursor)
        return False

    trainer = Trainer(config, Path(run), mesh, boundary)
    if grow_after is not None:
        trainer.setup.engine.scale.grow_after = grow_after
    if process.rank() == process.world() - 1:
        trainer.setup.model.norm.register_forward_hook(_poison(trainer, factors))
    try:
        trainer.run()
    except (NonFiniteError, Killed) as error:
        return str(error) or "killed"
    return "done"


def _poison(trainer: Trainer, factors: Mapping[int, float]) -> Callable[..., object]:
    def hook(norm, _inputs, x_TD):
        batch = trainer._cursor(trainer.skipped).row // trainer.config.train.global_batch
        return x_TD * factors[batch] if norm.training and batch in factors else None

    return hook
