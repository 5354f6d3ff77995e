"""A run that torchrun restarts goes on by itself: in the same directory, from its newest checkpoint. No torch here.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m turnout.launch.train experiment=switch_pydocs

Every attempt is a process of its own that gets the same words, so the directory says which torchrun it belongs to.
"""

import os
import socket
from pathlib import Path

from .main import PREEMPTED
from .rundir import read_exit

MARK = "torchrun"
FINAL = (2, 3, PREEMPTED)  # another attempt would end the same way, or was not asked for


def mark(run: Path) -> None:
    """Note that the run belongs to this torchrun."""
    (run / MARK).write_text(_ours(), encoding="utf-8")


def earlier(given: str | None) -> Path | None:
    """The directory of this torchrun's earlier attempts: `given`, or the newest of `runs/`; None when none was made."""
    places = [Path(given)] if given is not None else sorted(Path("runs").glob("*"), reverse=True)
    ours = _ours()
    return next((run for run in places if (run / MARK).is_file() and (run / MARK).read_text("utf-8") == ours), None)


def final(run: Path) -> int | None:
    """The exit code of the earlier attempt if it ends every later one too."""
    code = read_exit(run).get("code")
    return code if code in FINAL else None


def _ours() -> str:
    """What all attempts under one torchrun have in common: its id, or where nobody chose one, its process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"
