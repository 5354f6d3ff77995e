"""One rank of a training run: from the frozen configuration to an exit code that says why it ended.

torch is imported here, after the configuration has been validated.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .. import PeerError, TurnoutError
from ..moe.train.config import RunConfig
from .main import PREEMPTED, exit_code
from .rundir import record_exit

PID = "rank0.pid"
SAME_SIGNAL = 2.0  # seconds; a batch system and torchrun may both deliver one request to stop
UNANIMOUS = (0, 4, PREEMPTED)  # endings on which all ranks have voted


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGINT ask the run to stop at the next step boundary; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked: float | None = None

    def __call__(self) -> bool:
        return self.asked is not None

    def install(self) -> None:
        """Take over the signals; main thread only."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
        elif now - self.asked > SAME_SIGNAL:
            os._exit(PREEMPTED)


def main(run: Path, config: RunConfig, *, launched: bool) -> int:
    """Train as one rank and return the process's exit status.

    Args:
        run: the run's directory.
        config: what was frozen into it.
        launched: whether `turnout train` waits for us: it reads codes from `exit.json`, and torchrun, which would print
            a page about any status but 0, gets 0 for endings that all ranks share.
    """
    stop, rank = StopSignal(), int(os.environ.get("RANK", "0"))
    stop.install()
    end_with_parent()
    if rank == 0:
        (run / PID).write_text(str(os.getpid()), encoding="ascii")
    code, reason = _train(run, config, stop)
    record_exit(run, rank, code, reason)
    if code not in (0, PREEMPTED) and (rank == 0 or code not in UNANIMOUS):
        sys.stderr.write(f"turnout: {reason}\n")
    sys.stderr.flush()
    status = 0 if launched and code in UNANIMOUS else code
    if code not in UNANIMOUS and "WORLD_SIZE" in os.environ:
        os._exit(status)  # the process group's destruction would wait for a peer that is gone
    return status


def restarted(timeout: float) -> bool:
    """Whether torchrun started any of the ranks again after a failure. Collective."""
    from ..parallel import process

    process.start(timeout)
    return any(process.gather_json(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))


def share(timeout: float, value: dict[str, Any]) -> None:
    """Rank 0 of a plain torchrun start tells the others what it composed."""
    from ..parallel import process

    process.start(timeout)
    process.broadcast_json(value)


def receive(timeout: float) -> dict[str, Any]:
    """What rank 0 told."""
    from ..parallel import process

    process.start(timeout)
    return process.broadcast_json(None)


def _train(run: Path, config: RunConfig, stop: StopSignal) -> tuple[int, str]:
    from ..inference.write import write
    from ..moe.train.loop import train
    from ..parallel import process
    from ..parallel.mesh import build_mesh

    try:
        process.start(config.parallel.timeout)
        moe = config.model.moe
        mesh = build_mesh(config.parallel, num_experts=moe.num_experts if moe else None)
        outcome = train(config, run, mesh, stop, write)
    except (TurnoutError, OSError) as error:
        code, reason = exit_code(error), str(error)
        if code in UNANIMOUS:
            process.stop()
        if isinstance(error, PeerError):
            end_neighbours(error.silent)
        return code, reason
    except Exception as error:  # noqa: BLE001  (a defect of ours: its trace is shown and its rank recorded)
        traceback.print_exc()
        return 1, repr(error)
    process.stop()
    if outcome.preempted:
        return PREEMPTED, f"asked to stop: saved at step {outcome.step}"
    return 0, f"done: {outcome.step} steps"


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send us `number` when the process that started us dies, so that no run leaves orphans (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)


def end_neighbours(pids: Sequence[int]) -> None:
    """Kill ranks that do not answer, so that nothing waits for one that is stopped.

    Only processes that have our parent are touched: a number may belong to somebody else by now.
    """
    for pid in pids:
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            if int(stat.rpartition(")")[2].split()[1]) == os.getppid():
                os.kill(pid, signal.SIGKILL)
