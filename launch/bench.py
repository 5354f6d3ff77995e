"""`turnout bench`: what this machine does, in several ways side by side, beside what it could do at best."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import ConfigError
from ..configs.typed import check
from ..inference.config import EngineConfig
from . import bench_serve
from .bench_serve import ServeBenchOptions
from .benches import show
from .cli import Options, parse, write_json

if TYPE_CHECKING:
    from .benches.ceilings import Ceilings
    from .workload import Job

SUMMARY = "measure kernels, the MoE layer, serving, training, and their peers"
HELP = f"""\
usage: turnout bench WHAT [CKPT] [key=value ...]

WHAT is one of

  kernels              every operation in its forms: time, bytes, FLOPs, and the share of this machine's ceilings
  moe                  the layer behind a router at 1 to 4,096 tokens, beside zentorch's and transformers'
  offline CKPT         64 mixed requests (prompts of 16 to 406 tokens, 3,591 tokens out): tokens/s, TTFT, TPOT, memory
  serve [CKPT]         servers under load over HTTP: TTFT, TPOT, ITL, tokens/s, goodput, start time, memory (below)
  train                a training step: tokens/s, memory and MFU, beside a dense twin and a loop over the experts
  scheduler CKPT       time of planning and committing a step, beside the step, with so many requests decoding
  deterministic CKPT   a prefill and a decode step with the library's kernels and with the batch-invariant ones

CKPT is a run, a model directory or a GGUF file. What is compared runs in turns, `rounds` times; medians count. The
ceilings (memory read, matrix products) are measured in the same run.

  ops, forms      kernels: only these, such as ops=linear,rope forms=torch,cpp (moe takes `forms` too)
  shape           moe: qwen3-30b-a3b, qwen3moe-mini, mixtral, olmoe, gpt-oss or switch-base-128 (all with SwiGLU)
  experts=null    moe: how many of them; null = what memory allows
  tokens=1,..     moe: rows
  routing=uniform moe: or zipf (a few experts are popular) or one (all rows take the same)
  huge=true       kernels, moe: weights and pages lie in huge pages
  vary            offline: settings to compare in all their values, such as batching or batching,kv_layout
  requests=64     offline: how many
  rate=null       offline: requests a second (Poisson); null = all are there from the beginning
  workload=null   offline: a JSON file with `requests` (`prompt_ids`, `out`) and `arrivals_unit`
  peers=null      offline, train: the folder in which other engines are installed; their rows stand beside ours
  rounds=null     how often; null = once (5 times: kernels, moe, train)
  nproc=null      train: beside one process, so many that share the experts (peak: of rank 0)
  running=64,512  scheduler: requests that decode at once
  steps=16        scheduler: steps that are measured
  engine.*        the engine's settings, such as engine.dtype=bfloat16
  json, plot      null    write the figures there, as JSON, as a PNG

{bench_serve.HELP}
example: turnout bench offline runs/NAME vary=batching engine.dtype=bfloat16
         turnout bench moe shape=qwen3-30b-a3b tokens=1,16,256 plot=moe.png
         turnout bench serve url=http://127.0.0.1:8000 rate=1,2,4,8 slo.ttft=0.5 slo.tpot=0.05 plot=serve.png
"""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """What `turnout bench` takes; see HELP."""

    ops: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    shape: str = "qwen3-30b-a3b"
    experts: int | None = None
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
    routing: Literal["uniform", "zipf", "one"] = "uniform"
    huge: bool = True
    vary: tuple[str, ...] = ()
    requests: int = 64
    rate: float | None = None
    workload: str | None = None
    peers: str | None = None
    rounds: int | None = None
    nproc: int | None = None
    running: tuple[int, ...] = (64, 512)
    steps: int = 16
    plot: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("requests", "rounds", "experts", "running", "tokens", "nproc"):
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                check(value is None or value >= 1, name, value, "must be at least 1", "use a positive number")
        check(self.steps >= 2, "steps", self.steps, "must be at least 2", "use 16")
        check(self.rate is None or self.rate > 0, "rate", self.rate, "must be positive", "use requests a second")


@dataclass(frozen=True)
class Found:
    """Rows, and the machine's ceilings where they are held against them.

    `tables`, `draw`: what is printed and drawn in place of the rows.
    """

    rows: list[dict[str, Any]]
    ceilings: "Ceilings | None" = None
    tables: Sequence[show.Rows] = ()
    draw: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Measure:
    """Something that can be measured, for a model ("" without one); and how many models may be named."""

    run: Callable[[str, Any], Found]
    models: tuple[int, ...] = (1,)
    options: type[Options] = BenchOptions


def main(args: list[str]) -> int:
    """The verb."""
    what, path = _what(list(itertools.takewhile(lambda arg: "=" not in arg, args)))
    _, options = parse(MEASURES[what].options, args)
    assert isinstance(options, BenchOptions | ServeBenchOptions)
    found = MEASURES[what].run(path, options)
    own = {"bench": what, "model": path, "machine": show.machine(), "engine": asdict(options.engine)}
    if found.ceilings is not None:
        print(f"this machine: {found.ceilings}")
        own["ceilings"] = asdict(found.ceilings)
    print("\n\n".join(map(show.table, found.tables or [found.rows])), flush=True)
    write_json(options.json, {**own, "rows": found.rows})
    if options.plot is not None and found.draw is not None:
        found.draw(Path(options.plot))
    elif options.plot is not None:
        show.draw(what, found.rows, Path(options.plot), found.ceilings)
    return 0


def _what(words: list[str]) -> tuple[str, str]:
    """What is measured, and the model ("" where none is named)."""
    what, *paths = words or [""]
    if what not in MEASURES:
        raise ConfigError(f"turnout bench {what!r} is not measured here: use one of {', '.join(MEASURES)}")
    allowed = MEASURES[what].models
    if len(paths) not in allowed:
        usage = f"turnout bench {what}{' CKPT' if max(allowed) else ''} [key=value ...]"
        raise ConfigError(f"turnout bench {what} takes {allowed[0]} model, not {len(paths)}: use `{usage}`")
    return what, paths[0] if paths else ""


def _bounded(run: Callable[[], list[dict[str, Any]]]) -> Found:
    """Rows against the ceilings, which are measured before and after: the better count."""
    from .benches import ceilings

    before = ceilings.measure(ceilings.device())
    rows = run()
    found = before.or_better(ceilings.measure(ceilings.device()))
    return Found(show.rated(rows, found), found)


def _kernels(path: str, options: BenchOptions) -> Found:
    from .benches import kernels

    kernels.check_names(options.ops, options.forms)
    own: dict[str, Any] = {"ops": options.ops, "forms": options.forms, "huge": options.huge}
    return _bounded(lambda: list(kernels.measure(rounds=options.rounds or 5, **own)))


def _moe(path: str, options: BenchOptions) -> Found:
    from ..inference.run.free import free_memory
    from .benches import ceilings, moe

    shape = moe.resident(options.shape, options.experts, free_memory(ceilings.device()))
    print(f"{options.shape}: {shape.experts} experts resident, {options.routing} routing", flush=True)
    own: dict[str, Any] = {"tokens": options.tokens, "routing": options.routing, "forms": options.forms}
    return _bounded(lambda: moe.measure(shape, rounds=options.rounds or 5, huge=options.huge, **own))


def _offline(path: str, options: BenchOptions) -> Found:
    from .benches import engine

    for name in options.vary:
        check(name in engine.VALUES, "vary", name, "can not be varied", f"use {', '.join(engine.VALUES)}")
    peers, rounds = _peers(options), options.rounds or 1
    jobs = _jobs(path, options)
    rows = engine.offline(path, jobs, options.engine, options.vary, options.rate, rounds)
    if peers is None:
        return Found(rows)
    from .benches import generate

    theirs = bench_serve.peers_rows(path, jobs, options.rate, peers, rounds)
    return Found(
        [*({"server": "turnout, in process", **row} for row in rows), *theirs, generate.ask(peers, path, jobs)]
    )


def _serve(path: str, options: ServeBenchOptions) -> Found:
    found = bench_serve.measure(path, options)
    return Found(found.rows, tables=found.tables, draw=found.draw)


def _train(path: str, options: BenchOptions) -> Found:
    from .benches import ceilings, train

    config, before = train.config_of(path), ceilings.measure(ceilings.device())
    rows = train.measure(config, options.rounds or 5, _peers(options), options.nproc)
    found = before.or_better(ceilings.measure(ceilings.device()))
    for row in rows:
        if "flops" in row:
            row["mfu"] = row.pop("flops") / row["step_s"] / found.bfloat16
    return Found(rows, found)


def _peers(options: BenchOptions) -> Path | None:
    """The folder of other engines."""
    if options.peers is None:
        return None
    folder = Path(options.peers).expanduser()
    check(folder.is_dir(), "peers", options.peers, "is no folder", "name the one in which they are installed")
    return folder


def _scheduler(path: str, options: BenchOptions) -> Found:
    from .benches import engine

    return Found(engine.scheduler(path, options.engine, options.running, options.steps))


def _deterministic(path: str, options: BenchOptions) -> Found:
    from .benches import engine

    return Found(engine.deterministic(path, options.engine))


def _jobs(path: str, options: BenchOptions) -> "list[Job]":
    """The workload."""
    from .workload import mixed, read

    if options.workload:
        return read(options.workload)
    from .benches.engine import text

    return mixed(text(path), options.requests)


MEASURES: Mapping[str, Measure] = {
    "kernels": Measure(_kernels, models=(0,)),
    "moe": Measure(_moe, models=(0,)),
    "offline": Measure(_offline),
    "serve": Measure(_serve, models=(0, 1), options=ServeBenchOptions),
    "train": Measure(_train, models=(0, 1)),
    "scheduler": Measure(_scheduler),
    "deterministic": Measure(_deterministic),
}
