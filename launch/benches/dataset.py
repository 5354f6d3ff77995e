"""What is asked: prompts and lengths, drawn by a seed or read from a file.

Prompts are cut from a text; in tokens where a model's tokenizer is known, else of 4 characters for a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import ConfigError, DataError
from ...configs.typed import check
from ..workload import MARGIN, mixed, read
from .lengths import Dataset
from .online import Ask
from .trace import Line, lines

CHUNK = 4  # characters of a text that stand for a token
BLOCK = 512  # tokens of a prompt that one of a trace's hashes stands for (Mooncake)
USUAL = {"prompt": (128, 0.7, 16, 512), "output": (64, 0.6, 8, 192)}
"""Of lognormal lengths: mean, sigma, least, most."""


@dataclass(frozen=True)
class Source:
    """What prompts are cut from.

    Args:
        ids: token ids, or numbers of pieces of a text.
        spell: ids as a prompt.
    """

    ids: Sequence[int]
    spell: Callable[[Sequence[int]], tuple[int, ...] | str] = tuple


def pieces(text: str) -> Source:
    """A text for a server whose tokens are not known."""
    chunks = [text[at : at + CHUNK] for at in range(0, len(text), CHUNK)]
    return Source(range(len(chunks)), lambda ids: "".join(chunks[at] for at in ids))


def asks(dataset: Dataset, source: Source, *, spread: bool = False) -> list[Ask]:
    """The requests, due as a Poisson process of one a second has it, or as a trace has written it.

    Args:
        dataset: how long they are, and how many.
        source: what prompts are cut from.
        spread: a trace's own times are wanted.

    Raises:
        ConfigError: a text that is too short.
        DataError: a file that does not read.
    """
    if dataset.workload is not None:
        return [Ask(prompt=job.prompt, tokens=job.tokens, due=job.arrival) for job in read(dataset.workload)]
    if len(source.ids) <= MARGIN:
        raise ConfigError(
            f"text ({dataset.text}) must have more than {MARGIN} tokens to cut prompts from: use a longer one"
        )
    rng = np.random.default_rng([dataset.seed, 1])
    if dataset.trace is not None:
        return _traced(dataset, source, rng, spread=spread)
    count = dataset.requests or 64
    if not (dataset.prompt_tokens or dataset.output_tokens or dataset.prefix_tokens):
        jobs = mixed(source.ids, count, dataset.seed)
        return [Ask(prompt=source.spell(job.prompt), tokens=job.tokens, due=job.arrival) for job in jobs]
    prompts = _lengths(rng, dataset.prompt_tokens, "prompt", count)
    outputs = _lengths(rng, dataset.output_tokens, "output", count)
    due = np.cumsum(rng.exponential(1.0, count))
    heads = [_cut(source, rng, dataset.prefix_tokens) for _ in range(dataset.prefixes)]
    found = []
    for prompt, output, at in zip(prompts, outputs, due, strict=True):
        head = heads[int(rng.integers(len(heads)))]
        ids = [*head, *_cut(source, rng, int(prompt))]
        found.append(Ask(prompt=source.spell(ids), tokens=int(output), due=float(at), shared=len(head)))
    return found


def documents(dataset: Dataset) -> list[str]:
    """What prompts are cut from: a file, or the shipped text."""
    if dataset.text is None:
        from ...moe.data.corpus import read_documents

        return read_documents("pydocs", "validation")
    try:
        return [Path(dataset.text).expanduser().read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{dataset.text} is not UTF-8 (byte {error.start}): text is cut from a plain text file"
        ) from error


def _lengths(rng: Any, given: tuple[int, ...], what: str, count: int) -> Any:
    if given:
        return rng.integers(given[0], given[-1] + 1, count)
    mean, sigma, least, most = USUAL[what]
    drawn = np.exp(rng.normal(np.log(mean) - sigma * sigma / 2, sigma, count))
    return np.clip(drawn.astype(int), least, most)


def _cut(source: Source, rng: Any, size: int) -> list[int]:
    """So many tokens from some place on, from the beginning again at the end."""
    start, whole = int(rng.integers(len(source.ids))), len(source.ids)
    return [source.ids[(start + i) % whole] for i in range(size)]


def _traced(dataset: Dataset, source: Source, rng: Any, *, spread: bool) -> list[Ask]:
    assert dataset.trace is not None
    found = lines(dataset.trace)[: dataset.requests]
    check(bool(found), "trace", dataset.trace, "has no line", "give a line a request")
    if spread and any(line.seconds is None for line in found):
        raise DataError(f"{dataset.trace} has lines without timestamp: load=trace needs one in each")
    due = np.cumsum(rng.exponential(1.0, len(found)))
    if spread:
        first = min(line.seconds or 0.0 for line in found)
        due = np.array([(line.seconds or 0.0) - first for line in found])
    made = [_prompt(line, source, rng, dataset.seed) for line in found]
    outputs = _lengths(rng, dataset.output_tokens, "output", len(found))
    wanted = [
        Ask(prompt=prompt, tokens=int(line.output or drawn), due=float(at), shared=shared)
        for line, (prompt, shared), drawn, at in zip(found, made, outputs, due, strict=True)
    ]
    return sorted(wanted, key=lambda ask: ask.due)


def _prompt(line: Line, source: Source, rng: Any, seed: int) -> tuple[tuple[int, ...] | str, int]:
    """The prompt, and how many of its first tokens may be another's too."""
    if line.prompt is not None:
        return line.prompt, 0
    if not line.hashes:
        return source.spell(_cut(source, rng, line.input)), 0
    blocks = [_cut(source, np.random.default_rng([seed, 2, one]), BLOCK) for one in line.hashes]
    ids = [token for block in blocks for token in block][: line.input]
    ids += _cut(source, rng, line.input - len(ids))
    return source.spell(ids), min(BLOCK, line.input)
