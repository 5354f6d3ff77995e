"""`turnout serve` with a fault: `python -m turnout.tests.helpers.broken_serve FAULT CKPT key=value ...`

From step 20 on no step can be computed: it raises (`crash`) or never ends (`hang`). The time of that is printed.
"""

import sys
import time

from turnout.inference.run.runner import ModelRunner
from turnout.launch.main import main

STEP = 20
CAUSE = "no such kernel"


class Broken(ModelRunner):
    """Counts its steps, and then has its fault."""

    steps = 0

    def forward(self, plan):
        Broken.steps += 1
        if Broken.steps < STEP:
            return super().forward(plan)
        if Broken.steps == STEP:
            print(f"fault: {time.monotonic()}", flush=True)
        while sys.argv[1] == "hang":
            time.sleep(1)
        raise RuntimeError(CAUSE)


if __name__ == "__main__":
    from turnout.inference import machine

    machine.ModelRunner = Broken
    sys.exit(main(["serve", *sys.argv[2:]]))
