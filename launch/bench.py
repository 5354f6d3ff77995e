"""`turnout bench`: what this machine does with a model, in several ways side by side."""

import itertools
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import ConfigError, __version__
from ..configs.typed import check
from ..inference.config import EngineConfig
from .cli import Options, parse, write_json

if TYPE_CHECKING:
    from .workload import Job, Report

SUMMARY = "measure serving offline, the scheduler, or what determinism costs"
HELP = """\
usage: turnout bench WHAT CKPT [key=value ...]

WHAT is one of

  offline         64 mixed requests (prompts of 16 to 406 tokens, 3,591 tokens out): tokens/s, TTFT, TPOT, memory
  scheduler       time of planning and committing a step, beside the step, with so many requests decoding
  deterministic   a prefill and a decode step with the library's kernels and with the batch-invariant ones

CKPT is a run, a model directory or a GGUF file. Ways that are compared run in turns, `rounds` times; medians count.

  vary            offline: settings to compare in all their values, such as batching or batching,kv_layout
  requests=64     offline: how many
  rate=null       offline: requests a second (Poisson); null = all are there from the beginning
  workload=null   offline: a JSON file with `requests` (`prompt_ids`, `out`) and `arrivals_unit`
  rounds=1        offline: how often
  running=64,512  scheduler: requests that decode at once
  steps=16        scheduler: steps that are measured
  engine.*        the engine's settings, such as engine.dtype=bfloat16
  json, plot      null    write the figures there, as JSON, as a PNG

example: turnout bench offline runs/NAME vary=batching engine.dtype=bfloat16
"""
VALUES: Mapping[str, tuple[Any, ...]] = {
    "batching": ("continuous", "static", "dynamic"),
    "kv_layout": ("paged", "contiguous"),
    "kv_dtype": ("auto", "int8"),
    "deterministic": (False, True),
    "overlap": (False, True),
    "enable_prefix_caching": (True, False),
}
DRAWN: Mapping[str, str] = {
    "tokens_per_second": "output tokens / s",
    "kv_utilisation": "filled / reserved slots of the KV cache, mean over time",
    "ttft_p50": "time to first token, p50, s",
    "ttft_p99": "time to first token, p99, s",
    "tpot_p50": "time per output token, p50, s",
    "tpot_p99": "time per output token, p99, s",
}
PROMPT = 16  # tokens of a request that the scheduler is measured with


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """What `turnout bench` takes; see HELP."""

    vary: tuple[str, ...] = ()
    requests: int = 64
    rate: float | None = None
    workload: str | None = None
    rounds: int = 1
    running: tuple[int, ...] = (64, 512)
    steps: int = 16
    plot: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in self.vary:
            check(name in VALUES, "vary", name, "can not be varied", f"use {', '.join(VALUES)}")
        for name, values in (("requests", [self.requests]), ("rounds", [self.rounds]), ("running", self.running)):
            for value in values:
                check(value >= 1, name, value, "must be at least 1", "use a positive number")
        check(self.steps >= 2, "steps", self.steps, "must be at least 2", "use 16")
        check(self.rate is None or self.rate > 0, "rate", self.rate, "must be positive", "use requests a second")


def main(args: list[str]) -> int:
    """The verb."""
    (what, path), options = parse(BenchOptions, args, words=("what", "ckpt"))
    if what not in MEASURES:
        raise ConfigError(f"turnout bench {what!r} is not measured here: use one of {', '.join(MEASURES)}")
    rows = MEASURES[what](path, options)
    result = {"bench": what, "model": path, "machine": machine(), "engine": asdict(options.engine), "rows": rows}
    print(table(rows), flush=True)
    write_json(options.json, result)
    if options.plot is not None:
        draw(rows, Path(options.plot))
    return 0


def offline(path: str, options: BenchOptions) -> list[dict[str, Any]]:
    """The mixed workload, in every way that is asked for."""
    from .workload import compare, mixed, read

    varied = list(itertools.product(*(VALUES[name] for name in options.vary)))
    ways = [replace(options.engine, **dict(zip(options.vary, values, strict=True))) for values in varied]
    jobs: Sequence[Job] = read(options.workload) if options.workload else mixed(_text(path), options.requests)
    turns = [compare(path, jobs, ways, options.rate) for _ in range(options.rounds)]
    return [
        {**dict(zip(options.vary, values, strict=True)), **_median(reports)}
        for values, *reports in zip(varied, *turns, strict=True)
    ]


def scheduler(path: str, options: BenchOptions) -> list[dict[str, Any]]:
    """Steps in which so many requests decode: their time, and the scheduler's part."""
    from ..inference.engine import Engine
    from .workload import Job, measure

    rows = []
    for running in options.running:
        config = replace(
            options.engine,
            max_num_seqs=running,
            max_num_batched_tokens=max(running, options.engine.max_num_batched_tokens),
            max_model_len=PROMPT + options.steps,
            enable_prefix_caching=False,
        )
        engine = Engine.from_path(path, config)
        vocabulary = engine.model_config.vocab_size
        prompts = [tuple((7919 * i + 31 * at) % vocabulary for at in range(PROMPT)) for i in range(running)]
        report = measure(engine, [Job(prompt=prompt, tokens=options.steps) for prompt in prompts])
        rows.append(
            {
                "running": running,
                "step_ms": 1e3 * report.scheduler_seconds / report.scheduler_share,
                "scheduler_ms": 1e3 * report.scheduler_seconds,
                "share": report.scheduler_share,
            }
        )
    return rows


def deterministic(path: str, options: BenchOptions) -> list[dict[str, Any]]:
    """One prefill and one decode step, with the library's kernels and with ours."""
    from ..inference.cost import deterministic_cost
    from ..moe import load_model

    found = deterministic_cost(load_model(path, options.engine.dtype))
    steps = {f"prefill of {found.prompt}": "prefill", f"decode of {found.batch}": "decode"}
    return [
        {"step": step, "fast_ms": fast, "deterministic_ms": slow, "ratio": slow / fast}
        for step, name in steps.items()
        for fast, slow in [(1e3 * getattr(found.fast, name), 1e3 * getattr(found.deterministic, name))]
    ]


MEASURES: Mapping[str, Callable[[str, BenchOptions], list[dict[str, Any]]]] = {
    "offline": offline,
    "scheduler": scheduler,
    "deterministic": deterministic,
}


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "turnout": __version__,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in columns, numbers to four digits."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel of bars for every figure that people compare; all of them where there are none of those."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers = [
        name for name, value in rows[0].items() if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    panels = [name for name in numbers if name in DRAWN] or numbers
    ways = [", ".join(str(value) for name, value in row.items() if name not in numbers) or "model" for row in rows]
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(12, lines * (0.7 + 0.32 * len(rows))), layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, panels, strict=False):
        bars = axes.barh(ways, [row[name] for row in rows], color="#31688e")
        axes.bar_label(bars, labels=[_cell(row[name]) for row in rows], padding=3)
        axes.set_title(DRAWN.get(name, name.replace("_", " ")), loc="left", fontsize=10)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _median(reports: "Sequence[Report]") -> dict[str, Any]:
    rows = [{"tokens_per_second": report.output_tokens_per_second, **asdict(report)} for report in reports]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _text(path: str) -> list[int]:
    """The shipped text, in the model's tokens."""
    from ..moe.data.corpus import read_documents
    from ..moe.data.tokenizer import Tokenizer
    from ..moe.models.store import tokenizer_directory

    with tokenizer_directory(path) as directory:
        tokenizer = Tokenizer.load(directory)
    return list(
        itertools.chain.from_iterable(tokenizer.encode(text) for text in read_documents("pydocs", "validation"))
    )


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
