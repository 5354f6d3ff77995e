"""A mixed workload on an engine, offline: the numbers by which ways of serving are compared.

    engine = Engine.from_path("runs/x", EngineConfig(batching="static"))
    print(measure(engine, mixed(token_ids)))

Prompt and output lengths are lognormal, as in traces of chats: many short ones and a long tail.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..inference.config import EngineConfig
from ..inference.core.sampling import SamplingParams

if TYPE_CHECKING:
    from ..inference.engine import Engine

MARGIN = 1000
"""A prompt begins so many tokens before the end of the text at the latest."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request: greedy, as long as wanted whatever is generated.

    Args:
        prompt: token ids.
        tokens: to generate.
        arrival: in seconds, if one request arrives a second.
    """

    prompt: tuple[int, ...]
    tokens: int
    arrival: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a workload took; times in seconds.

    Args:
        requests: how many.
        output_tokens: generated in all.
        seconds: from the first arrival to the last token.
        ttft_p50, ttft_p99: from a request's arrival to its first token.
        tpot_p50, tpot_p99: of a request, between its tokens; of those with two or more.
        kv_utilisation: filled / reserved slots, mean over the time since the engine's start.
        preemptions: how often a request lost its blocks.
        steps: that computed something.
        scheduler_seconds: planning and committing, mean of a step.
        scheduler_share: of the time of a step.
    """

    requests: int
    output_tokens: int
    seconds: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    kv_utilisation: float
    preemptions: int
    steps: int
    scheduler_seconds: float
    scheduler_share: float

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds


def mixed(text: Sequence[int], count: int = 64, seed: int = 7) -> list[Job]:
    """Prompts of 16 to 512 tokens (mean 128) and outputs of 8 to 192 (mean 64), before they are clipped; arrivals of a
    Poisson process.

    Args:
        text: token ids to cut prompts from, more than 1,000.
        count: requests.
        seed: of the lengths, places and arrivals.
    """
    rng = np.random.default_rng(seed)

    def lengths(mean: float, sigma: float, least: int, most: int) -> Any:
        drawn = np.exp(rng.normal(np.log(mean) - sigma * sigma / 2, sigma, count))
        return np.clip(drawn.astype(int), least, most)

    prompts, outputs = lengths(128, 0.7, 16, 512), lengths(64, 0.6, 8, 192)
    starts = [int(rng.integers(0, len(text) - MARGIN)) for _ in range(count)]
    arrivals = np.cumsum(rng.exponential(1.0, count))
    return [
        Job(prompt=tuple(text[start : start + size]), tokens=int(tokens), arrival=float(arrival))
        for start, size, tokens, arrival in zip(starts, prompts, outputs, arrivals, strict=True)
    ]


def read(path: Path | str) -> list[Job]:
    """A workload that was written: `requests` with `prompt_ids` and `out`, `arrivals_unit`."""
    written = json.loads(Path(path).read_text(encoding="utf-8"))
    pairs = zip(written["requests"], written["arrivals_unit"], strict=True)
    return [Job(prompt=tuple(one["prompt_ids"]), tokens=one["out"], arrival=at) for one, at in pairs]


def measure(engine: "Engine", jobs: Sequence[Job], rate: float | None = None) -> Report:
    """Run the workload.

    Args:
        engine: idle; it is used for this alone meanwhile.
        jobs: all that is to be done.
        rate: requests a second; None = all are there from the beginning.
    """
    before, start = engine.stats(), time.perf_counter()
    due = [(0.0 if rate is None else job.arrival / rate, str(i), job) for i, job in enumerate(jobs)]
    arrived = {name: at for at, name, _ in due}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    due.sort(reverse=True, key=lambda one: one[0])
    with _stopwatch(engine.scheduler, ("schedule", "schedule_ahead", "commit")) as spent:
        stepping = 0.0
        while due or engine.has_unfinished:
            now = time.perf_counter() - start
            while due and due[-1][0] <= now:
                _, name, job = due.pop()
                engine.add_request(name, job.prompt, greedy(job.tokens))
            if not engine.has_unfinished:
                time.sleep(due[-1][0] - now)
                continue
            for output in engine.step():
                at = time.perf_counter() - start
                first.setdefault(output.request_id, at)
                last[output.request_id] = at
            stepping += time.perf_counter() - start - now
    stats, seconds = engine.stats(), max(last.values())
    steps = stats.steps - before.steps
    ttft = [first[name] - at for name, at in arrived.items()]
    tpot = [(last[str(i)] - first[str(i)]) / (job.tokens - 1) for i, job in enumerate(jobs) if job.tokens > 1]
    return Report(
        requests=len(jobs),
        output_tokens=sum(job.tokens for job in jobs),
        seconds=seconds - min(arrived.values()),
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p99=float(np.percentile(ttft, 99)),
        tpot_p50=float(np.percentile(tpot, 50)) if tpot else 0.0,
        tpot_p99=float(np.percentile(tpot, 99)) if tpot else 0.0,
        kv_utilisation=stats.kv_utilisation_mean,
        preemptions=stats.preemptions - before.preemptions,
        steps=steps,
        scheduler_seconds=spent[0] / steps,
        scheduler_share=spent[0] / stepping,
    )


def compare(
    path: Path | str, jobs: Sequence[Job], ways: Sequence[EngineConfig], rate: float | None = None
) -> list[Report]:
    """The same workload in several ways, one after another, on one model that is loaded once.

    Args:
        path: as `load_model` has it.
        ways: the engines' settings; `dtype` is the first one's.
    """
    from ..inference.engine import Engine

    engine = Engine.from_path(path, ways[0])
    found = [measure(engine, jobs, rate)]
    for way in ways[1:]:
        model, tokenizer = engine.runner.model, engine.tokenizer
        del engine  # its cache makes room for the next one's
        engine = Engine(model, tokenizer, way)
        found.append(measure(engine, jobs, rate))
    return found


def greedy(tokens: int) -> SamplingParams:
    """So many tokens, each the most probable."""
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


@contextmanager
def _stopwatch(owner: Any, names: Sequence[str]) -> Iterator[list[float]]:
    """Seconds spent in these methods of `owner`."""
    spent = [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent[0] += time.perf_counter() - start

        return run

    for name in names:
        setattr(owner, name, timed(getattr(owner, name)))
    try:
        yield spent
    finally:
        for name in names:
            delattr(owner, name)
