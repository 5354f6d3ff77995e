"""`turnout serve` in slow motion: `python -m turnout.tests.helpers.paced_serve FILE CKPT key=value ...`

Every step takes `PACE` longer, and once FILE exists no step can be computed.
"""

import sys
import time
from pathlib import Path

from turnout.inference.run.runner import ModelRunner
from turnout.launch.main import main

PACE = 0.02  # seconds


class Paced(ModelRunner):
    """Takes its time, until it breaks."""

    def forward(self, plan):
        time.sleep(PACE)
        if Path(sys.argv[1]).exists():
            raise RuntimeError("no such kernel")
        return super().forward(plan)


if __name__ == "__main__":
    from turnout.inference import machine

    machine.ModelRunner = Paced
    sys.exit(main(["serve", *sys.argv[2:]]))
