"""What safety costs, as shares of the step time of the same run.

    python -m turnout.tests.helpers.overheads                        # two ranks, experiment=switch_pydocs
    python -m turnout.tests.helpers.overheads model=tiny train.steps=20

Votes are timed back to back behind a barrier, so that no waiting for a slower rank is counted; what belongs to a save
is divided by the SAVE_EVERY steps that it protects.
"""

import hashlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from turnout.launch.compose import compose
from turnout.moe.train import state
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.checkpoint.writer import DISK, Save
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.forks import ends, start_ranks

SAVE_EVERY = 100
WORDS = ["experiment=switch_pydocs", "nproc=2", "train.seconds=null", "train.steps=12", "train.eval_every=null"]


def measure(run: str, words: list[str]) -> dict[str, float]:
    """Train as one rank; the median step in seconds, and by safety the share of a step that it costs. Collective."""
    config = compose(words, world=process.world()).config
    mesh = build_mesh(config.parallel, "cpu", config.model.moe.num_experts)
    moments: list[float] = []
    Path(run).mkdir(exist_ok=True)
    trainer = Trainer(config, Path(run), mesh, lambda: bool(moments.append(time.perf_counter())))
    trainer.run()
    step = statistics.median(b - a for a, b in itertools.pairwise(moments))
    setup = trainer.setup
    named = state.tensors(setup.model, setup.engine.optimizers, setup.shards)

    def begun(name: str, behind: bool) -> Save:
        return Save(Path(run) / name, 1, named, {}, mesh, disk=DISK, snapshot=behind)

    def within() -> None:
        save = begun("within", False)
        save.wait()
        save.commit()

    held = seconds(within)
    behind: list[Save] = []
    copied = seconds(lambda: behind.append(begun("behind", True)))
    behind[0].wait()
    committed = seconds(behind[0].commit)
    files = [path.read_bytes() for path in sorted((Path(run) / "within").glob("step-*/rank-*"))]
    hashed = max(seconds(lambda raw=raw: hashlib.sha256(raw).digest()) for raw in files)
    votes = [seconds(lambda: trainer._vote(0.0)) for _ in range(50)]
    finite = [seconds(lambda: process.all_sum(named["model/norm.weight"][0].sum().reshape(1))) for _ in range(50)]
    return {
        "step (seconds)": step,
        "vote at the step boundary": statistics.median(votes) / step,
        "vote on non-finite gradients": statistics.median(finite) / step,
        "hashing": hashed / SAVE_EVERY / step,
        "a save within the steps": held / SAVE_EVERY / step,
        "a save behind the steps": (copied + committed) / SAVE_EVERY / step,
    }


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes, begun by all ranks together."""
    process.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def tell(run: str, words: list[str]) -> None:
    """Measure, and print rank 0's table."""
    found = measure(run, words)
    if process.rank() == 0:
        for name, value in found.items():
            sys.stdout.write(f"{name:<32}{value:>9.4f}\n" if "seconds" in name else f"{name:<32}{value:>9.3%}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        sys.exit(max(ends(start_ranks(tell, 2, f"{directory}/run", [*WORDS, *sys.argv[1:]]))))
