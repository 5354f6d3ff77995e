"""`turnout bench offline|scheduler|deterministic`: a model on our engine, in several ways side by side."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ...inference.config import EngineConfig
from ...inference.cost import deterministic_cost
from ...inference.engine import Engine
from ...moe import load_model
from ..workload import Job, Report, compare, measure

VALUES: Mapping[str, tuple[Any, ...]] = {
    "batching": ("continuous", "static", "dynamic"),
    "kv_layout": ("paged", "contiguous"),
    "kv_dtype": ("auto", "int8"),
    "deterministic": (False, True),
    "overlap": (False, True),
    "enable_prefix_caching": (True, False),
}
PROMPT = 16  # tokens of a request that the scheduler is measured with


def offline(
    path: str, jobs: Sequence[Job], engine: EngineConfig, vary: Sequence[str], rate: float | None, rounds: int
) -> list[dict[str, Any]]:
    """The workload, in every way that is asked for."""
    varied = list(itertools.product(*(VALUES[name] for name in vary)))
    ways = [replace(engine, **dict(zip(vary, values, strict=True))) for values in varied]
    turns = [compare(path, jobs, ways, rate) for _ in range(rounds)]
    return [
        {**dict(zip(vary, values, strict=True)), **_median(reports)}
        for values, *reports in zip(varied, *turns, strict=True)
    ]


def scheduler(path: str, engine: EngineConfig, seats: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Steps in which so many requests decode: their time, and the scheduler's part."""
    rows = []
    for running in seats:
        config = replace(
            engine,
            max_num_seqs=running,
            max_num_batched_tokens=max(running, engine.max_num_batched_tokens),
            max_model_len=PROMPT + steps,
            enable_prefix_caching=False,
        )
        own = Engine.from_path(path, config)
        vocabulary = own.model_config.vocab_size
        prompts = [tuple((7919 * i + 31 * at) % vocabulary for at in range(PROMPT)) for i in range(running)]
        report = measure(own, [Job(prompt=prompt, tokens=steps) for prompt in prompts])
        rows.append(
            {
                "running": running,
                "step_ms": 1e3 * report.scheduler_seconds / report.scheduler_share,
                "scheduler_ms": 1e3 * report.scheduler_seconds,
                "share": report.scheduler_share,
            }
        )
    return rows


def deterministic(path: str, engine: EngineConfig) -> list[dict[str, Any]]:
    """One prefill and one decode step, with the library's kernels and with ours."""
    found = deterministic_cost(load_model(path, engine.dtype))
    steps = {f"prefill of {found.prompt}": "prefill", f"decode of {found.batch}": "decode"}
    return [
        {"step": step, "fast_ms": fast, "deterministic_ms": slow, "ratio": slow / fast}
        for step, name in steps.items()
        for fast, slow in [(1e3 * getattr(found.fast, name), 1e3 * getattr(found.deterministic, name))]
    ]


def text(path: str, documents: Sequence[str] | None = None) -> list[int]:
    """These documents, or the shipped text, in the model's tokens."""
    from ...moe.data.corpus import read_documents
    from ...moe.data.tokenizer import Tokenizer
    from ...moe.models.store import tokenizer_directory

    with tokenizer_directory(path) as directory:
        tokenizer = Tokenizer.load(directory)
    given = read_documents("pydocs", "validation") if documents is None else documents
    return list(itertools.chain.from_iterable(tokenizer.encode(text) for text in given))


def _median(reports: Sequence[Report]) -> dict[str, Any]:
    rows = [{"tokens_per_second": report.output_tokens_per_second, **asdict(report)} for report in reports]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}
