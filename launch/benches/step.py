"""Our trainer, one step at a time: the run in argv, then `step` or `peak` a line on stdin, an answer a line on stdout.

The trainer asks at every step boundary whether it is to stop; here it waits there for the word to go on. With a number
after the run so many processes share its experts: rank 0 reads and answers, the others wait for its vote.
"""

import json
import os
import sys
import time
from pathlib import Path

from ...moe.train.loop import Trainer
from ...parallel import process
from ...parallel.mesh import build_mesh
from .. import ranks
from ..rank import end_with_parent
from ..rundir import frozen
from .servers import peak_bytes


class Gate:
    """Lets the trainer make a step for every line `step`; ends the process with its input."""

    def __init__(self) -> None:
        self._start: float | None = None

    def __call__(self) -> bool:
        if self._start is not None:
            _say({"seconds": time.perf_counter() - self._start})
        for line in sys.stdin:
            if line.strip() == "step":
                self._start = time.perf_counter()
                return False
            _say({"bytes": peak_bytes(os.getpid())})
        os._exit(0)  # nothing is to be saved


def _say(answer: dict[str, float]) -> None:
    print(json.dumps(answer), flush=True)


def main(run: Path, world: int) -> int:
    """Train until stdin ends."""
    config = frozen(run)
    if world > 1 and not ranks.is_rank():
        return ranks.run(f"{__package__}.step", [str(run), str(world)], world, config.parallel.timeout)
    end_with_parent()
    process.start(config.parallel.timeout)
    moe = config.model.moe
    mesh = build_mesh(config.parallel, num_experts=moe.num_experts if moe else None)
    Trainer(config, run, mesh, Gate() if mesh.rank == 0 else lambda: False).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
