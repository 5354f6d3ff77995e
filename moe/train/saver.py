"""The checkpoints of a run: begun at step boundaries, written at once or behind the steps, committed by all ranks.

    saver.begin(now.step, tensors, meta)     # a snapshot, and a thread that writes it (train.async_save)
    saver.poll(writing)                      # at every later boundary: commit what all ranks have written
    saver.settle()                           # wait for it and commit it

At most one is under way. A save that fails is told at the next boundary, at the latest when the next one begins; one
more than `train.save_failures` of them in a row ends the run, and so does the failure of its last.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import CheckpointError
from ...parallel.checkpoint.disk import Disk
from ...parallel.checkpoint.writer import DISK, Save
from ...parallel.mesh import Mesh
from .config import TrainConfig
from .metrics import Metrics
from .state import Named


class Saver:
    """Every method but `writing` is collective.

    Args:
        root: the run's `checkpoints/`.
        train: how checkpoints are to be written and kept.
        saved: the checkpoint that the run goes on from; None at its beginning.
        disk: the disk operations.

    Attributes:
        saved: the newest committed checkpoint.
    """

    def __init__(
        self, root: Path, train: TrainConfig, mesh: Mesh, metrics: Metrics, saved: Path | None, disk: Disk = DISK
    ) -> None:
        self.root, self.train, self.mesh, self.metrics, self.disk = root, train, mesh, metrics, disk
        self.saved, self.resumed = saved, saved
        self.under_way: Save | None = None
        self.failures, self.last = 0, False  # how many in a row; whether no later one can make up for it

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self.under_way is not None and not self.under_way.written

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of `step` is committed."""
        return self.saved is not None and self.saved.name == f"step-{step:08d}"

    def begin(self, step: int, named: Named, meta: Mapping[str, Any], *, last: bool = False) -> None:
        """Save what `named` holds now: on return it is saved, or with `train.async_save` copied and on its way.

        The `last` one of a run is saved on return.

        Raises:
            CheckpointError: this one, or the one under way, is one failure too many.
        """
        self.settle()
        self.last, behind = last, self.train.async_save and not last
        try:
            self.under_way = Save(self.root, step, named, meta, self.mesh, disk=self.disk, snapshot=behind)
        except CheckpointError as error:
            self._failed(step, error)
        if not behind:
            self.settle()

    def poll(self, writing: bool) -> None:
        """Commit what is under way, unless a rank still writes (`writing`, the same on every rank).

        Raises:
            CheckpointError: it failed, and that was one failure too many.
        """
        if self.under_way is not None and not writing:
            self.settle()

    def settle(self) -> None:
        """Wait for what is under way and commit it.

        Raises:
            CheckpointError: it failed, and that was one failure too many.
        """
        save, self.under_way = self.under_way, None
        if save is None:
            return
        try:
            save.wait()
            self.saved = save.commit()
            save.retain(self.train.keep, self.resumed)
        except CheckpointError as error:
            self._failed(save.step, error)
        else:
            self.failures = 0

    def _failed(self, step: int, error: CheckpointError) -> None:
        allowed = self.train.save_failures
        if self.last or self.failures == allowed:
            raise error
        self.failures += 1
        row = {"kind": "save_failed", "step": step, "in_a_row": self.failures, "reason": str(error)}
        self.metrics.event(row, f"SAVE FAILED ({self.failures} of {allowed} in a row may): {error}")
