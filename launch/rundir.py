"""A run's directory: made once, locked while it is used, and left with a word about how it ended. No torch here.

runs/<id>/config.yaml      the frozen configuration, read by every rank
          overrides.json   the words it was composed from (a resumed run starts from them)
          lock             host, pid and run of whoever trains in it
          exit.json        each rank's exit code and reason, and the run's
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from .. import CheckpointError, ConfigError
from ..configs.typed import build, to_dict
from ..moe.train.config import RunConfig

CONFIG, OVERRIDES, LOCK, EXIT = "config.yaml", "overrides.json", "lock", "exit.json"
LOST = 5


def new_directory(name: str, root: Path = Path("runs")) -> Path:
    """Make `root/<time>-<name>`, counting up when two start within a second.

    Raises:
        CheckpointError: a thousand did.
    """
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    for count in range(1000):
        path = root / (f"{stem}-{count}" if count else stem)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise CheckpointError(f"{root / stem} was made a thousand times this second: choose run=DIR")


def freeze(run: Path, config: RunConfig, overrides: Sequence[str]) -> None:
    """Write the configuration that every rank reads, and forget an earlier part's ending.

    Raises:
        ConfigError: the directory holds checkpoints that this run would not resume.
    """
    run.mkdir(parents=True, exist_ok=True)
    held = [*(run / "checkpoints").glob("step-*"), *(run / "checkpoints" / "quarantine").glob("step-*")]
    if config.train.resume is False and held:
        raise ConfigError(f"run ({run}) holds checkpoints already: add train.resume=true, or choose another directory")
    (run / EXIT).unlink(missing_ok=True)
    _replace(run / OVERRIDES, json.dumps(list(overrides)) + "\n")
    _replace(run / CONFIG, yaml.safe_dump(to_dict(config), sort_keys=False))


def frozen(run: Path) -> RunConfig:
    """The configuration that was frozen into `run`.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    try:
        plain = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"run ({run}) has no readable {CONFIG} ({error}): start it with `turnout train`") from error
    return build(RunConfig, plain)


def earlier_overrides(run: Path) -> list[str]:
    """The words an existing run was composed from.

    Raises:
        ConfigError: it is no run.
    """
    try:
        return [str(word) for word in json.loads((run / OVERRIDES).read_text(encoding="utf-8"))]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"train.resume ({run}) is not a run ({OVERRIDES} is missing): name a run directory"
        ) from error


@contextmanager
def locked(run: Path) -> Iterator[int]:
    """Hold the run's directory; yields the lock's descriptor, for a child that is to hold it too.

    The kernel drops the lock when its last holder dies, so a killed run never leaves a stale one.

    Raises:
        ConfigError: another process trains in it; host, pid and run are named.
    """
    path = run / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 4096).decode("utf-8", "replace").strip() or "another process"
            raise ConfigError(f"run ({run}) is in use by {holder}: wait for it, or choose another directory") from error
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "run": run.name}).encode())
        yield fd
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def record_exit(run: Path, rank: int, code: int, reason: str) -> None:
    """Add one rank's ending to `exit.json`; ranks may do so at the same time."""
    guard = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        ranks = read_exit(run).get("ranks", {})
        ranks[str(rank)] = {"code": code, "reason": reason}
        content = {"code": run_code(ranks), "ranks": dict(sorted(ranks.items(), key=lambda item: int(item[0])))}
        _replace(run / EXIT, json.dumps(content, indent=1) + "\n")
    finally:
        os.close(guard)


def read_exit(run: Path) -> dict[str, Any]:
    """What `exit.json` says; empty before any rank has ended."""
    path = run / EXIT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def conclude(run: Path, world: int, failed: bool) -> int:
    """The run's exit code after all its processes ended; a rank that left no word in a failed run was lost."""
    if failed:
        for rank in range(world):
            if str(rank) not in read_exit(run).get("ranks", {}):
                record_exit(run, rank, LOST, "killed: it left no word")
    return int(read_exit(run).get("code", 1 if failed else 0))


def run_code(ranks: Mapping[str, Mapping[str, Any]]) -> int:
    """One code for the run: a cause (2, 3, 4, 6, 1) before its effect on peers (5), before 143, before 0."""
    codes = [int(entry["code"]) for _, entry in sorted(ranks.items(), key=lambda item: int(item[0]))]
    causes = [code for code in codes if code not in (0, LOST, 143)]
    return causes[0] if causes else LOST if LOST in codes else max(codes, default=0)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
