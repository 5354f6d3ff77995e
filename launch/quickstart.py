"""`turnout quickstart`: the whole job on real text, small: train, show, evaluate, serve, sum up.

Nothing here is special to it: it runs `turnout train`, `turnout evaluate`'s functions and `turnout serve` as a person
would. A check that fails is shown as failed and makes the exit code 1.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from . import plots
from .cli import Options, parse, write_json
from .compose import accelerators
from .server_process import serving
from .streams import percentile, stream_completions

SUMMARY = "train, evaluate and serve a small Switch model on real text: the whole job in minutes"
HELP = """\
usage: turnout quickstart [quick=true] [run=DIR] [json=PATH]

Trains a small Switch model on Python's documentation (2 ranks with expert parallelism, or all GPUs of this machine),
evaluates it beside Markov models, serves it and streams 8 completions at once.

  quick=true   the reduced form: under 2 minutes instead of 4 to 7 on two CPU cores
  run=DIR      the run's directory (default: runs/quickstart-<time>)
  json=PATH    also write the summary there (it is always written to <run>/quickstart.json)

example: turnout quickstart quick=true
"""

PROMPTS = (
    "The list type",
    "To open a file",
    "A generator function",
    "Changed in version 3",
    "This module provides",
    "If the argument is",
    "Return a new",
    "The following example",
)
EXPERTS = 8
ROWS_PER_RANK = 4
WIDTH = 100  # characters of a line


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions(Options):
    """What a person can choose.

    Args:
        quick: the reduced form of the same path.
        run: the run's directory; None = a new one under `runs/`.
    """

    quick: bool = False
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the full and the reduced form differ in.

    Args:
        length: the settings that end training.
        eval_bytes: held-out text that evaluation reads; None = all of it.
        order: of the Markov model to beat.
        shuffled: by how much shuffling the experts must raise the loss (relative).
        max_tokens: of each streamed completion.
    """

    length: tuple[str, ...]
    eval_bytes: int | None
    order: int
    shuffled: float
    max_tokens: int


FULL = Form(length=("train.seconds=null", "train.steps=600"), eval_bytes=None, order=5, shuffled=0.02, max_tokens=96)
QUICK = Form(
    length=("train.seconds=null", "train.steps=100"), eval_bytes=100_000, order=2, shuffled=0.005, max_tokens=32
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold, and whether it did."""

    name: str
    passed: bool
    detail: str


def main(args: list[str]) -> int:
    """Run the quickstart; 0 when every check passed."""
    _, options = parse(QuickstartOptions, args, words=())
    form = QUICK if options.quick else FULL
    run = Path(options.run or f"runs/quickstart-{time.strftime('%Y%m%d-%H%M%S')}")
    started = time.monotonic()
    code = train(run, form)
    if code != 0:
        return code
    show(run)
    report = evaluate(run, form)
    latencies = serve(run, form)
    checks = judge(report, form)
    seconds = time.monotonic() - started
    summary = {
        "run": str(run),
        "seconds": seconds,
        "evaluation": report,
        "serving": latencies,
        "checks": [asdict(check) for check in checks],
    }
    for path in (run / "quickstart.json", options.json):
        write_json(path, summary)
    conclude(run, seconds, checks)
    return 0 if all(check.passed for check in checks) else 1


def train(run: Path, form: Form) -> int:
    """Train through `turnout train`: 2 ranks on CPUs, one a GPU where there are any. Returns its exit code."""
    ranks = accelerators() or 2
    ep = math.gcd(ranks, EXPERTS)
    heading(1, f"train a Switch model of {EXPERTS} experts on {ranks} ranks, experts spread over {ep}")
    settings = [
        "experiment=switch_pydocs",
        f"run={run}",
        f"nproc={ranks}",
        f"parallel.ep={ep}",
        f"train.global_batch={max(8, ROWS_PER_RANK * ranks)}",
        f"moe.num_experts={EXPERTS}",
        *form.length,
    ]
    say(f"turnout train {' '.join(settings)}")
    from . import train as verb

    return verb.main(settings)


def show(run: Path) -> None:
    """Where the picture is, and the same as text (a terminal has had it from `turnout train` already)."""
    heading(2, "loss and expert load over time")
    if not sys.stdout.isatty():
        plots.sketch(run, Console(width=WIDTH))
    say(f"picture: {run / 'plots.png'}")


def evaluate(run: Path, form: Form) -> dict[str, Any]:
    """Evaluate the exported model as `turnout evaluate` does."""
    heading(3, "evaluate on held-out text")
    from .evaluate import EvaluateOptions, describe, report

    options = EvaluateOptions(baselines=True, order=form.order, max_bytes=form.eval_bytes)
    result = report(run, options)
    for line in describe(result):
        say(line)
    return result


def serve(run: Path, form: Form) -> dict[str, Any]:
    """Start the real server, stream all prompts at once, stop it; the latencies."""
    heading(4, f"serve it and stream {len(PROMPTS)} completions at once")
    with serving(run, run) as address:
        say(f"turnout serve {run}: listening on {address}")
        streams = stream_completions(f"{address}/v1", PROMPTS, say, max_tokens=form.max_tokens)
    ttft = [stream.ttft * 1e3 for stream in streams]
    tpot = [stream.tpot * 1e3 for stream in streams if stream.tpot is not None]
    latencies = {
        "ttft_ms": {"p50": percentile(ttft, 0.5), "p99": percentile(ttft, 0.99)},
        "tpot_ms": {"p50": percentile(tpot, 0.5), "p99": percentile(tpot, 0.99)} if tpot else None,
    }
    for name, words in (("ttft_ms", "time to first token"), ("tpot_ms", "time per output token")):
        values = latencies[name]
        if values is not None:
            say(f"{words:<22} p50 {values['p50']:7.1f} ms   p99 {values['p99']:7.1f} ms   ({len(streams)} streams)")
    say("the server stopped cleanly")
    return {**latencies, "streams": [asdict(stream) for stream in streams]}


def judge(report: dict[str, Any], form: Form) -> list[Check]:
    """What the run must have reached."""
    bits, markov = report["bits_per_byte"], report["markov"]["bits_per_byte"][str(form.order)]
    loss, shuffled = report["loss"], report["shuffled_loss"]
    worse = shuffled / loss - 1
    return [
        Check(
            name=f"beats the Markov model of order {form.order}",
            passed=bits < markov,
            detail=f"{bits:.3f} against {markov:.3f} bits per byte",
        ),
        Check(
            name="the experts do something",
            passed=worse >= form.shuffled,
            detail=f"shuffling them takes the loss from {loss:.3f} to {shuffled:.3f}: {worse:+.2%}, at least"
            f" {form.shuffled:+.1%} is wanted",
        ),
    ]


def conclude(run: Path, seconds: float, checks: Sequence[Check]) -> None:
    """The checks, where everything is, and what to try next."""
    heading(5, f"summary ({seconds:.0f} s)")
    for check in checks:
        say(f"{'ok    ' if check.passed else 'FAILED'} {check.name}: {check.detail}")
    say("")
    for what, path in (
        ("configuration", "config.yaml"),
        ("metrics", "metrics.jsonl"),
        ("picture", "plots.png"),
        ("checkpoints", "checkpoints"),
        ("model to serve", "model"),
        ("this summary", "quickstart.json"),
    ):
        say(f"{what:<15} {run / path}")
    say("\ntry next:")
    say(f'  turnout generate {run} prompt="{PROMPTS[0]}"')
    say(f"  turnout serve {run} port=8000")
    say("  turnout train experiment=gshard_pydocs train.seconds=60")


def heading(number: int, text: str) -> None:
    """One of the five parts begins."""
    say(f"\n[{number}/5] {text}")


def say(line: str) -> None:
    """One line, at once also in a pipe."""
    print(line, flush=True)
