"""Start a frozen run in processes of its own and wait for it: torchrun for several ranks, one process for one.

Signals that reach us are passed on to rank 0, whose vote stops all ranks at a step boundary; the run's exit code comes
from `exit.json`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from . import rundir
from .compose import Composed, accelerators

# What glibc's allocator is told: keep freed memory instead of returning it to the kernel after every step.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launch(run: Path, composed: Composed, words: Sequence[str]) -> int:
    """Freeze the run and train it in processes of its own; the run's exit code."""
    with rundir.locked(run) as lock:
        rundir.freeze(run, composed.config, words)
        sys.stdout.write(f"run {run}\n")
        sys.stdout.flush()
        status = Ranks(run, composed, lock).wait()
        return rundir.conclude(run, composed.world, failed=status != 0)


class Ranks:
    """The processes of a run; signals that reach us while we wait are passed on to rank 0, whose vote stops them all.

    Args:
        run: the frozen run.
        composed: its configuration and number of ranks.
        lock: a descriptor that the processes hold too, so that the lock outlives us if they do.
    """

    def __init__(self, run: Path, composed: Composed, lock: int) -> None:
        self.run, self.signals = run, 0
        (run / "rank0.pid").unlink(missing_ok=True)
        command = [sys.executable, "-m", "turnout.launch.train", f"run={run}", "frozen=true"]
        if composed.world > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(composed.world)]
            command[1:2] = [*torchrun, "-m"]
        env = environment(os.environ, composed.world, composed.config.parallel.timeout)
        self.process = subprocess.Popen(command, env=env, pass_fds=(lock,), start_new_session=True)  # noqa: S603

    def wait(self) -> int:
        """The exit status of the processes."""
        main_thread = threading.current_thread() is threading.main_thread()  # signals can be taken over only there
        earlier = {number: signal.signal(number, self._pass_on) for number in _STOPPING if main_thread}
        try:
            return self.process.wait()
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            (self.run / "rank0.pid").unlink(missing_ok=True)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        pid = self.run / "rank0.pid"
        if self.signals > 1:
            self.process.kill()  # the ranks end with it
        elif pid.exists():
            os.kill(int(pid.read_text(encoding="ascii")), signal.SIGTERM)
        else:
            self.process.terminate()


def environment(base: Mapping[str, str], world: int, timeout: float) -> dict[str, str]:
    """The ranks' environment: threads shared out, the allocator told, torchrun quiet; what is already set wins."""
    cores = len(os.sched_getaffinity(0))
    ours = {
        **MALLOC,
        "OMP_NUM_THREADS": str(max(1, cores // world)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(timeout) + 60),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if not accelerators():
        ours["DS_ACCELERATOR"] = "cpu"  # DeepSpeed takes a CUDA build of torch for a GPU
    return {**ours, **base}


def summary(run: Path) -> dict[str, Any]:
    """How a run ended: its code and the last values of its metrics."""
    found: dict[str, Any] = {"run": str(run), "code": rundir.read_exit(run).get("code")}
    wanted = ("step", "tokens", "loss", "tokens_per_second", "drop_fraction", "val_loss", "bits_per_byte")
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        found.update({key: value for key, value in json.loads(line).items() if key in wanted})
    return found
