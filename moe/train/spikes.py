"""Loss spikes: which step is one, and the way back to a checkpoint that skips the rows of it.

A step is a spike when its loss, the mean cross entropy of the global batch, exceeds `train.spike` times the median of
the last WINDOW steps' losses, of which at least LEAST are known. The run then goes back to its newest checkpoint and
reads on behind the spike's rows. A checkpoint is never rewritten, so where the run reads on stands beside it:

    runs/x/rewind.json     {"to_step": 500, "checkpoint": "<sha256>", "cursor": {"epoch": 0, "row": 4640}, "rewinds": 1}
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ...parallel.checkpoint import open_checkpoint
from ...parallel.checkpoint.agree import on_first
from ...parallel.checkpoint.disk import sha256_of
from ...parallel.checkpoint.manifest import NAME
from ..data.rows import Cursor
from .setup import Setup, load
from .state import Progress

WINDOW, LEAST = 50, 10
NOTE = "rewind.json"


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step, counted from 1, whose loss exceeds `factor` times the median of those before it."""

    step: int
    loss: float
    median: float
    factor: float

    @property
    def text(self) -> str:
        """What happened."""
        return f"loss {self.loss:.4f} of step {self.step} is above {self.factor:g} x the median {self.median:.4f}"

    def row(self, kind: str) -> dict[str, Any]:
        """Its row of `metrics.jsonl`."""
        return {"kind": kind, "step": self.step, "loss": self.loss, "median": self.median}


def find(now: Progress, loss: float, factor: float) -> Spike | None:
    """The spike that the step after `now` is, if it is one."""
    if len(now.losses) < LEAST or loss <= factor * (middle := median(now.losses)):
        return None
    return Spike(step=now.step + 1, loss=loss, median=middle, factor=factor)


def remember(losses: Sequence[float], loss: float) -> tuple[float, ...]:
    """The last WINDOW losses with one more."""
    return (*losses, loss)[-WINDOW:]


def rewind(run: Path, setup: Setup, saved: Path, now: Progress, cursor: Cursor) -> Progress:
    """Go back to the checkpoint `saved` and read on at `cursor`; noted before it counts. Collective.

    Raises:
        CheckpointError: the checkpoint does not verify any more, or the note can not be written.
    """
    there = load(open_checkpoint(saved), setup)
    there = replace(there, cursor=cursor, rewinds=now.rewinds + 1, seconds=now.seconds, wandb_id=now.wandb_id)
    on_first(lambda: _leave_note(run, saved, there))
    return there


def read_on(run: Path, saved: Path, progress: Progress) -> Progress:
    """Where a run that resumes from `saved` reads on: behind the rows that a rewind to this very checkpoint skipped."""
    path = run / NOTE
    if not path.is_file():
        return progress
    note = json.loads(path.read_text(encoding="utf-8"))
    if note["checkpoint"] != sha256_of(saved / NAME):
        return progress
    return replace(progress, cursor=Cursor(**note["cursor"]), rewinds=note["rewinds"])


def _leave_note(run: Path, saved: Path, progress: Progress) -> None:
    note = {"to_step": progress.step, "checkpoint": sha256_of(saved / NAME)}
    note |= {"cursor": asdict(progress.cursor), "rewinds": progress.rewinds}
    aside = run / f"tmp-{NOTE}"
    aside.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    aside.replace(run / NOTE)
