"""What a few steps spend their time on: a profiler trace a rank, and a small table from rank 0.

    runs/x/profile/rank-00000.json.gz     Chrome trace: open it in Perfetto or chrome://tracing

Steps are recorded after a warm-up. A profiler that does not work is a warning, never the end of a run.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, schedule

FOLDER = "profile"
WARMUP = 3  # steps that are not recorded: first calls, allocations
TOP = 10
STEP = "ProfilerStep"
EXCHANGES = {"all-to-all": r"all_?to_?all|sendrecv", "all-reduce": r"all_?reduce"}  # gloo's and NCCL's names for them


class Profile:
    """Records `steps` optimizer steps of this rank, then lets go.

    Args:
        steps: how many; None = none, and nothing is ever done.
        run: the run's directory.
        rank: of the world; 0 prints.
    """

    def __init__(self, steps: int | None, run: Path, rank: int) -> None:
        self.file, self.rank = run / FOLDER / f"rank-{rank:05d}.json.gz", rank
        self.seen, self.last = 0, WARMUP + (steps or 0)
        self._profiler: torch.profiler.profile | None = None
        if steps is not None:
            self._try(lambda: self._start(steps))

    def _start(self, steps: int) -> None:
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
            schedule=schedule(wait=WARMUP - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def end_step(self) -> None:
        """A step is complete."""
        if self._profiler is not None:
            self.seen += 1
            self._try(self._profiler.step)
            if self.seen == self.last:
                self.close()

    def close(self) -> None:
        """Stop; a run that ended early leaves the steps that were recorded."""
        if self._profiler is not None:
            self._try(self._profiler.stop)
            self._profiler = None
            if self.seen <= WARMUP:
                self._warn(f"the run ended in its warm-up of {WARMUP} steps")

    def _write(self, profiler: Any) -> None:
        self.file.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.file))
        if self.rank == 0:
            sys.stdout.write(table(profiler, self.seen - WARMUP))
            sys.stdout.flush()

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  (a driver, a full disk: never a reason to stop)
            self._profiler = None
            self._warn(str(error))

    def _warn(self, cause: str) -> None:
        text = f"train.profile left no trace on rank {self.rank}: {cause}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def table(profiler: Any, steps: int) -> str:
    """The operators with most time of their own, and the share of the time in which ranks exchange data.

    Args:
        steps: recorded whole; the time is theirs.
    """
    events = list(profiler.events())
    marks = [event.time_range for event in events if event.name.startswith(STEP) and event.device_type.name == "CPU"]
    total = sum(mark.end - mark.start for mark in sorted(marks, key=lambda mark: mark.start)[:steps])
    rows = [row for row in profiler.key_averages() if not row.key.startswith(STEP)]
    device = any(row.self_device_time_total for row in rows)
    own = {row: row.self_device_time_total if device else row.self_cpu_time_total for row in rows}
    lines = [f"profile: {steps} steps of {total / max(steps, 1) / 1e3:.1f} ms on rank 0"]
    lines.append(f"  {'operator':<44} {'calls':>7} {'ms a step':>10} {'share':>6}")
    for row in sorted(own, key=lambda row: -own[row])[:TOP]:
        spent = own[row] / max(steps, 1) / 1e3
        lines.append(f"  {row.key[:44]:<44} {row.count:>7} {spent:>10.2f} {own[row] / max(total, 1e-9):>6.1%}")
    for name, pattern in EXCHANGES.items():
        spans = [event.time_range for event in events if re.search(pattern, event.name, re.IGNORECASE)]
        covered = union((span.start, span.end) for span in spans)  # host and device, overlaps once
        lines.append(f"  {name} under way: {covered / max(total, 1e-9):.1%} of the time")
    return "\n".join(lines) + "\n"


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length that intervals cover together, overlaps once."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered
