"""`turnout train`: compose, validate, freeze, and start the ranks; or be one of them, under torchrun.

turnout train experiment=switch_pydocs nproc=2
torchrun --nproc-per-node 2 -m turnout.launch.train experiment=switch_pydocs
"""

import sys

if not __package__:
    sys.stderr.write("turnout: launch/train.py is part of a package: use torchrun ... -m turnout.launch.train ...\n")
    raise SystemExit(2)

import os
from collections.abc import Sequence
from pathlib import Path

from .. import ConfigError
from ..configs.typed import build, check, to_dict
from ..moe.train.config import RunConfig
from . import elastic, rundir
from . import main as cli
from .cli import write_json
from .compose import Composed, compose
from .launcher import launch, summary
from .rank_map import rank_map

SUMMARY = "train a model: turnout train experiment=switch_pydocs nproc=2"
HELP = """\
usage: turnout train [experiment=NAME] [key=value ...] [nproc=N] [run=DIR] [json=PATH]
       turnout train -m key=a,b [...]        a sweep: every combination, one after another
       turnout train train.resume=DIR [...]  go on with the run in DIR

Composed by Hydra: groups model=, moe=, data=, optim=, experiment=; single values as moe.num_experts=16.
Writes runs/<id>/: config.yaml, metrics.jsonl, plots.png, checkpoints/, model/ (servable), exit.json.
Exit codes: 0 done, 2 configuration, 3 data, 4 non-finite, 5 peer lost, 6 storage, 143 preempted and saved.

keys:      train.{steps,seconds,global_batch,micro_batch,seq_len,eval_every,save_every,init,resume}
           optim.{name,lr,...}  moe.{num_experts,router,trace,replay,...}  parallel.{pp,dp,cp,tp,ep,...}
           seed  engine  kernels
           parallel=auto picks the layout that `turnout plan` foretells to be fastest of those that fit
example:   turnout train experiment=switch_pydocs nproc=2 moe.num_experts=16
on nodes:  torchrun --nnodes 2 ... -m turnout.launch.train experiment=switch_pydocs run=DIR
"""


def main(args: list[str]) -> int:
    """The verb; returns the run's exit code."""
    words, result = take_json(args)
    if "-m" in words or "--multirun" in words:
        from . import sweep

        return sweep.main([word for word in words if word not in ("-m", "--multirun")], result)
    composed, words = prepare(words)
    run = directory(composed)
    if result is None:
        announce(composed)
    code = launch(run, composed, words)
    show(run)
    write_json(result, summary(run))
    return code


def announce(composed: Composed) -> None:
    """Say what `parallel=auto` chose and which rank does what."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", composed.world))
    chosen = composed.choice.lines() if composed.choice else ()
    for line in (*chosen, *rank_map(composed.config.layout(composed.world), node)):
        print(line, flush=True)


def show(run: Path) -> None:
    """Draw what the run measured, if it did. A picture that fails costs a line, never the run."""
    from rich.console import Console

    from . import plots

    try:
        if (run / "metrics.jsonl").exists() and plots.read_rows(run, "train"):
            plots.picture(run)
            if sys.stdout.isatty():
                plots.sketch(run, Console())
    except Exception as error:  # noqa: BLE001  (matplotlib, fonts, disk: the run itself is done)
        print(f"turnout: {run / 'plots.png'} could not be drawn: {error}", file=sys.stderr)


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
            words = merge(rundir.earlier_overrides(Path(wanted)), words)
            words = merge(words, [f"run={wanted}", "train.resume=true"])
    elif given is not None and wanted is not False and (Path(given) / rundir.OVERRIDES).exists():
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


def as_rank(args: list[str]) -> int:
    """What a process does that `launch` or torchrun started."""
    from . import rank

    words, result = take_json(args)
    if "frozen=true" in words:
        run = Path(next(word.partition("=")[2] for word in words if word.startswith("run=")))
        return rank.main(run, rundir.frozen(run), launched=True)
    world = int(os.environ["WORLD_SIZE"])
    composed, words = prepare(words, world)
    timeout = composed.config.parallel.timeout
    again = rank.restarted(timeout)
    if os.environ["RANK"] != "0":
        shared = rank.receive(timeout)
        if "ended" in shared:
            return int(shared["ended"])
        return rank.main(Path(shared["run"]), build(RunConfig, shared["config"]), launched=False)
    try:
        earlier = elastic.earlier(composed.run) if again else None
        if earlier is not None:
            if (code := elastic.final(earlier)) is not None:
                rank.share(timeout, {"ended": code})
                return code
            onward = ["train.resume=true"] if (earlier / "checkpoints").is_dir() else []
            composed, words = prepare(merge(words, [f"run={earlier}", *onward]), world)
        run = directory(composed)
        with rundir.locked(run):
            rundir.freeze(run, composed.config, words)
            elastic.mark(run)
            rank.share(timeout, {"run": str(run.resolve()), "config": to_dict(composed.config)})
            if result is None:
                announce(composed)
            code = rank.main(run, composed.config, launched=False)
            show(run)
            write_json(result, summary(run))
            return code
    except ConfigError:
        rank.share(timeout, {"ended": 2})
        raise


if __name__ == "__main__":
    started = "RANK" in os.environ or "frozen=true" in sys.argv
    sys.exit(cli.run(as_rank if started else main, sys.argv[1:]))
