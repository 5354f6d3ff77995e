"""`turnout train`: compose, validate, freeze, and start the ranks; or be one of them, under torchrun.

turnout train experiment=switch_pydocs nproc=2
torchrun --nproc-per-node 2 -m turnout.launch.train experiment=switch_pydocs
"""

import sys

if not __package__:
    sys.stderr.write("turnout: launch/train.py is part of a package: use torchrun ... -m turnout.launch.train ...\n")
    raise SystemExit(2)

import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .. import ConfigError
from ..configs.typed import build, check, to_dict
from ..moe.train.config import RunConfig
from . import main as cli
from . import rundir
from .cli import write_json
from .compose import Composed, compose

SUMMARY = "train a model: turnout train experiment=switch_pydocs nproc=2"
HELP = """\
usage: turnout train [experiment=NAME] [key=value ...] [nproc=N] [run=DIR] [json=PATH]
       turnout train -m key=a,b [...]        a sweep: every combination, one after another
       turnout train train.resume=DIR [...]  go on with the run in DIR

Composed by Hydra: groups model=, moe=, data=, optim=, experiment=; single values as moe.num_experts=16.
Writes runs/<id>/: config.yaml, metrics.jsonl, plots.png, checkpoints/, model/ (servable), exit.json.
Exit codes: 0 done, 2 configuration, 3 data, 4 non-finite, 5 peer lost, 6 storage, 143 preempted and saved.

keys:      train.{steps,seconds,global_batch,micro_batch,seq_len,eval_every,save_every,init,resume}
           optim.{name,lr,...}  moe.{num_experts,top_k,router,capacity_factor,...}  parallel.{dp,ep}  seed  engine
example:   turnout train experiment=switch_pydocs nproc=2 moe.num_experts=16
on nodes:  torchrun --nnodes 2 ... -m turnout.launch.train experiment=switch_pydocs run=DIR
"""

# What glibc's allocator is told: keep freed memory instead of returning it to the kernel after every step.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}


def main(args: list[str]) -> int:
    """The verb; returns the run's exit code."""
    words, result = take_json(args)
    if "-m" in words or "--multirun" in words:
        from . import sweep

        return sweep.main([word for word in words if word not in ("-m", "--multirun")], result)
    composed, words = prepare(words)
    run = directory(composed)
    code = launch(run, composed, words)
    show(run)
    write_json(result, summary(run))
    return code


def show(run: Path) -> None:
    """Draw what the run measured, if it did."""
    from rich.console import Console

    from . import plots

    if (run / "metrics.jsonl").exists() and plots.read_rows(run, "train"):
        plots.picture(run)
        if sys.stdout.isatty():
            plots.sketch(run, Console())


def take_json(args: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without `json=PATH`, and its path."""
    paths = [word.partition("=")[2] for word in args if word.startswith("json=")]
    return [word for word in args if not word.startswith("json=")], paths[-1] if paths else None


def prepare(words: Sequence[str], world: int | None = None) -> tuple[Composed, list[str]]:
    """Compose a run; nothing is written.

    `train.resume=DIR` without `run=` goes on in DIR. A run that is resumed begins from the words that it was started
    with, then takes the new ones.

    Returns:
        the validated run, and the words to be kept with it.
    """
    words = list(words)
    composed = compose(words, world, check_layout=False)
    wanted, given = composed.config.train.resume, composed.run
    if wanted is True and given is None:
        raise ConfigError("train.resume (true) needs a run to resume: add run=DIR, or use train.resume=DIR")
    if isinstance(wanted, str):
        check(Path(wanted).is_dir(), "train.resume", wanted, "is not a directory", "name a run or a checkpoint")
        if given is None and not Path(wanted).name.startswith("step-"):
            given, words = wanted, merge(words, [f"run={wanted}", "train.resume=true"])
    if given is not None and wanted is not False and (Path(given) / rundir.OVERRIDES).exists():
        words = merge(rundir.earlier_overrides(Path(given)), words)
    return compose(words, world), words


def directory(composed: Composed) -> Path:
    """The run's directory, made."""
    if composed.run is None:
        return rundir.new_directory(composed.name)
    run = Path(composed.run)
    run.mkdir(parents=True, exist_ok=True)
    return run


def merge(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """Both lists of `key=value`, each key once, the later value winning."""
    return list({word.partition("=")[0]: word for word in [*earlier, *later]}.values())


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
    return {**ours, **base}


def summary(run: Path) -> dict[str, Any]:
    """How a run ended: its code and the last values of its metrics."""
    found: dict[str, Any] = {"run": str(run), "code": rundir.read_exit(run).get("code")}
    wanted = ("step", "tokens", "loss", "tokens_per_second", "drop_fraction", "val_loss", "bits_per_byte")
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        found.update({key: value for key, value in json.loads(line).items() if key in wanted})
    return found


def as_rank(args: list[str]) -> int:
    """What a process does that `launch` or torchrun started."""
    from . import rank

    words, result = take_json(args)
    if "frozen=true" in words:
        run = Path(next(word.partition("=")[2] for word in words if word.startswith("run=")))
        return rank.main(run, rundir.frozen(run), launched=True)
    composed, words = prepare(words, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] != "0":
        shared = rank.receive(composed.config.parallel.timeout)
        return rank.main(Path(shared["run"]), build(RunConfig, shared["config"]), launched=False)
    run = directory(composed)
    with rundir.locked(run):
        rundir.freeze(run, composed.config, words)
        rank.share(composed.config.parallel.timeout, {"run": str(run.resolve()), "config": to_dict(composed.config)})
        code = rank.main(run, composed.config, launched=False)
        write_json(result, summary(run))
        return code


_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

if __name__ == "__main__":
    started = "RANK" in os.environ or "frozen=true" in sys.argv
    sys.exit(cli.run(as_rank if started else main, sys.argv[1:]))
