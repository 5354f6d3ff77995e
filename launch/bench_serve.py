"""`turnout bench serve`: what it takes, and what it prints."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import DataError
from ..configs.typed import check
from ..inference.config import EngineConfig
from .benches.arrivals import Arrivals, loads
from .benches.figures import STATISTICS, TIMES, Slo
from .benches.lengths import Dataset
from .benches.online import Target
from .cli import Options

if TYPE_CHECKING:
    from .benches.dataset import Source
    from .benches.online import Ask
    from .benches.serve import Contender
    from .workload import Job

SHARED = (
    "server", "tokens_per_second", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "ttft_alone", "tpot_alone",
    "ready_seconds", "peak_mb",
)  # fmt: skip
"""Figures that an engine without a server has too."""
HIDDEN = {"seconds", "tokens", "prompt_tokens"}
"""Not printed, only written."""
USUAL = {"short": 0, "counted": "usage", "tokens_per_piece": 1.0}
"""Printed where a server differs from it."""
HELP = """\
of `serve`:

  url=A,B              servers that run already, any that speak OpenAI's API; null = start ours on CKPT
  peers=PATH           the folder in which other engines are installed: they are started beside, on CKPT
  model, api_key       of the servers at url; the first model that a server lists
  endpoint=completions or chat; stream=false: only end-to-end times are known
  load                 poisson, burst, ramp, closed or trace; null = Poisson where a rate is given, else all at once
  rate=1,2,4           requests a second, a run for each; of a trace: its mean
  concurrency=1,8      closed: so many at a time, a run for each
  burst.size=8 burst.gap=2           so many at once, every so many seconds
  ramp.start=1 ramp.end=8 ramp.seconds=60     requests a second, at first and at last
  requests=64 seed=7   how many (null: all of a trace), and of what lengths, places and arrivals
  prompt_tokens, output_tokens       512: all alike; 64,512: uniform; null = lognormal (means 128 and 64)
  prefix_tokens=0 prefixes=1         so many tokens more that prompts share, in so many kinds
  text=FILE            prompts are cut from it; null = the shipped text
  trace=FILE           JSONL: timestamp (ms), input_length, output_length, hash_ids; or prompt (CSV as Azure's too)
  workload=FILE        JSON: `requests` (`prompt_ids`, `out`) and `arrivals_unit`
  warmup=1             requests before each turn that are not counted
  rounds=1             turns of each server, in an alternating order; medians count
  clients=1            processes that send
  slo.ttft, slo.tpot   seconds: goodput = requests a second that meet both
  requests_json=PATH   a line a request: due, sent, first, times of all pieces, end, status, tokens
"""


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions(Options, Arrivals, Dataset):
    """What `turnout bench serve` takes; see HELP."""

    url: tuple[str, ...] = ()
    peers: str | None = None
    model: str | None = None
    api_key: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    stream: bool = True
    warmup: int = 1
    rounds: int | None = None
    clients: int = 1
    slo: Slo = field(default_factory=Slo)
    requests_json: str | None = None
    plot: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        Arrivals.__post_init__(self)
        Dataset.__post_init__(self)
        check(self.rounds is None or self.rounds >= 1, "rounds", self.rounds, "must be at least 1", "use 2")
        check(self.warmup >= 0, "warmup", self.warmup, "must not be negative", "use 1")
        check(self.clients >= 1, "clients", self.clients, "must be at least 1", "use 2")
        check(not self.slo or self.stream, "stream", self.stream, "tells no time of a token", "leave slo or stream out")
        for url in self.url:
            check(url.startswith(("http://", "https://")), "url", url, "is no address", "use http://HOST:PORT")
        check(len(set(self.url)) == len(self.url), "url", self.url, "has one twice", "name each once")
        timed = self.trace is not None
        check(self.load != "trace" or timed, "load", self.load, "needs a trace", "set trace=FILE")
        free = self.workload is None or self.endpoint == "completions"
        check(free, "workload", self.workload, "has token ids, which a chat does not take", "use endpoint=completions")
        for name in ("model", "api_key"):
            given = getattr(self, name) is None or bool(self.url)
            check(given, name, "...", "is of a server that runs already", "set url, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All rows; the tables that are printed; what draws a picture."""

    rows: list[dict[str, Any]]
    tables: list[list[dict[str, Any]]]
    draw: Callable[[Path], None]


def measure(path: str, options: ServeBenchOptions) -> Measured:
    """Put the servers under load."""
    from .benches import serve, serve_plot

    needs = "is needed where no CKPT is named"
    check(bool(path or options.url), "url", None, needs, "name a model or a running server")
    check(bool(path) or options.peers is None, "peers", options.peers, "are started on a CKPT", "name a model")
    folder = None if options.peers is None else Path(options.peers).expanduser()
    check(folder is None or folder.is_dir(), "peers", options.peers, "is no folder",
          "name the one in which they are installed")  # fmt: skip
    asks = _asks(path, options)
    plan = serve.Plan(
        loads=loads(options, asks), rounds=options.rounds or 1, warmup=options.warmup, clients=options.clients
    )
    with _contenders(path, options, folder, len(asks)) as (contenders, absent):
        done = serve.turns(contenders, plan)
        rows = serve.rows(contenders, done, plan.loads, options.slo)
    ratios = serve.pairs(contenders, done, plan.loads)
    if options.requests_json is not None:
        serve.write_requests(options.requests_json, done)
    notes = [{"server": name, "note": "not installed"} for name in absent]
    return Measured(
        rows=[*rows, *ratios, *notes],
        tables=tables(rows, ratios, notes),
        draw=lambda to: serve_plot.draw(to, done, rows),
    )


def peers_rows(path: str, jobs: "Sequence[Job]", rate: float | None, peers: Path, rounds: int) -> list[dict[str, Any]]:
    """Rows of the peers that are installed, a note for the others, on a workload that something else runs too."""
    from .benches import serve
    from .benches.online import Ask

    asks = tuple(Ask(prompt=job.prompt, tokens=job.tokens, due=job.arrival) for job in jobs)
    plan = serve.Plan(loads=loads(Arrivals(rate=() if rate is None else (rate,)), asks), rounds=rounds)
    with serve.begun(path, (), peers, len(asks), Target(url="", model=""), own=False) as (begun, absent):
        found = serve.rows(begun, serve.turns(begun, plan), plan.loads, Slo()) if begun else []
    shown = [{name: row[name] for name in SHARED if name in row} for row in found]
    return [*shown, *({"server": name, "note": "not installed"} for name in absent)]


def tables(*groups: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows as a person reads them: what happened, its times, and the pairs."""
    rows, ratios, notes = groups
    spread = {f"{name}_{one}" for name in (*TIMES, "late") for one in STATISTICS}
    usual = {name for name, value in USUAL.items() if all(row.get(name, value) == value for row in rows)}
    plain = [{n: _words(v) for n, v in row.items() if n not in spread | usual | HIDDEN} for row in rows]
    label = [name for name in ("server", "rate", "concurrency") if name in rows[0]]
    times = [
        {**{n: row[n] for n in label}, "seconds": name, **{one: row[f"{name}_{one}"] for one in STATISTICS}}
        for row in rows
        for name in (*TIMES, "late")
        if f"{name}_p50" in row
    ]
    return [[*plain, *map(dict, notes)], times, *([list(map(dict, ratios))] * bool(ratios))]


@contextlib.contextmanager
def _contenders(
    path: str, options: ServeBenchOptions, peers: Path | None, seats: int
) -> "Iterator[tuple[list[Contender], list[str]]]":
    """All that take part, and the names of those that can not."""
    from .benches import serve

    like = Target(
        url="", model=options.model or "", endpoint=options.endpoint, key=options.api_key, stream=options.stream
    )
    running = serve.listening(options.url, like)
    if running and peers is None:
        yield running, []
        return
    with serve.begun(path, settings(options.engine), peers, seats, like, own=not running) as (begun, absent):
        yield [*running, *begun], absent


def settings(engine: EngineConfig) -> list[str]:
    """What the engine's settings differ from their defaults in, as `turnout serve` takes them."""
    usual = asdict(EngineConfig())
    return [f"{name}={value}" for name, value in asdict(engine).items() if value != usual[name]]


def _asks(path: str, options: ServeBenchOptions) -> "list[Ask]":
    from .benches import dataset

    found = dataset.asks(options, _source(path, options), spread=options.load == "trace")
    texts = all(isinstance(ask.prompt, str) for ask in found)
    if options.endpoint == "chat" and not texts:
        raise DataError(
            f"{options.trace} has prompts of token ids, which a chat does not take: use endpoint=completions"
        )
    return found


def _source(path: str, options: ServeBenchOptions) -> "Source":
    """Token ids where the model is known and takes them, else texts."""
    from .benches import dataset

    if options.workload is not None:
        return dataset.Source(())
    documents = dataset.documents(options)
    if not path or options.endpoint == "chat":
        return dataset.pieces("\n".join(documents))
    from .benches.engine import text

    return dataset.Source(text(path, documents))


def _words(value: Any) -> Any:
    """Counts of kinds in a cell of a table."""
    return ", ".join(f"{name}: {count}" for name, count in value.items()) or "-" if isinstance(value, dict) else value
