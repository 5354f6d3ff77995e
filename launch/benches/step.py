"""Our trainer, one step at a time: the run in argv, then `step` or `peak` a line on stdin, an answer a line on stdout.

The trainer asks at every step boundary whether it is to stop; here it waits there for the word to go on.
"""

import json
import os
import sys
import time
from pathlib import Path

from ...moe.train.loop import Trainer
from ...parallel.mesh import build_mesh
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


def main(run: Path) -> None:
    """Train until stdin ends."""
    config = frozen(run)
    moe = config.model.moe
    Trainer(config, run, build_mesh(config.parallel, num_experts=moe.num_experts if moe else None), Gate()).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
