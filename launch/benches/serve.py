"""`turnout bench serve`: a server, ours or any other, under requests that come one by one.

Servers that are compared all run and take turns; those whose turn it is not sleep. No prompt is sent twice: caches of
prefixes gain nothing.
"""

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..workload import Job, mixed
from . import online
from .online import Ask
from .servers import Command, Running, free_port, llama, ours, started, vllm

ALONE = 512  # tokens of the prompt of a request that has the server for itself
REPEATS = 3  # of such requests
AFTER = 33  # tokens that one of them generates
CHUNK = 4  # characters of a text that stand for a token
FIGURES = ("tokens_per_second", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "ttft_alone", "tpot_alone")


def asks(jobs: Sequence[Job], rate: float | None) -> list[Ask]:
    """The workload at so many requests a second; None = all at once."""
    return [Ask(prompt=j.prompt, tokens=j.tokens, due=0.0 if rate is None else j.arrival / rate) for j in jobs]


def texts(text: str, count: int, rate: float | None) -> list[Ask]:
    """The mixed workload for a server whose tokens are not known: texts of about as many tokens."""
    chunks = [text[at : at + CHUNK] for at in range(0, len(text), CHUNK)]
    found = asks(mixed(range(len(chunks)), count), rate)
    return [replace(ask, prompt="".join(chunks[int(at)] for at in ask.prompt)) for ask in found]


def running_server(url: str, wanted: Sequence[Ask], rounds: int) -> list[dict[str, Any]]:
    """A server that somebody else has started."""
    turns = [_turn(url, wanted, number) for number in range(rounds)]
    return [{"server": url, **_median(turns)}]


def compare(
    path: str, wanted: Sequence[Ask], settings: Sequence[str], peers: Path | None, rounds: int, *, own: bool = True
) -> list[dict[str, Any]]:
    """Our server on a model, and the peers that are installed, in turns; a row each, a note for those that are not.

    Args:
        path: the model.
        wanted: the workload.
        settings: of our server, as its command line has them.
        peers: the folder of other engines; None = only ours.
        rounds: turns of each.
        own: whether ours takes part.
    """
    commands: dict[str, Command | None] = {}
    ports = {name: free_port() for name in ("turnout", "vllm", "llama.cpp")}
    if own:
        commands["turnout"] = ours(path, ports["turnout"], settings)
    if peers is not None:
        commands["vllm"] = vllm(peers, path, ports["vllm"], len(wanted))
        commands["llama.cpp"] = llama(peers, path, ports["llama.cpp"])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: list[Running] = []
        for name, command in commands.items():
            if command is not None:
                server = stack.enter_context(started(command, ports[name], folder / f"{name}.log"))
                server.sleep()
                servers.append(server)
        rows = [{"server": s.name, **found} for s, found in zip(servers, _turns(servers, wanted, rounds), strict=True)]
    return rows + [{"server": name, "note": "not installed"} for name, command in commands.items() if command is None]


def _turns(servers: Sequence[Running], wanted: Sequence[Ask], rounds: int) -> Iterable[dict[str, float]]:
    found: list[list[dict[str, float]]] = [[] for _ in servers]
    for number in range(rounds):
        for server, turns in zip(servers, found, strict=True):
            server.wake()
            turns.append(_turn(server.url, wanted, number))
            server.sleep()
    for server, turns in zip(servers, found, strict=True):
        yield {**_median(turns), "ready_seconds": server.ready_seconds, "peak_mb": server.peak_mb}


def _turn(url: str, wanted: Sequence[Ask], number: int) -> dict[str, float]:
    """A request to warm up, some alone, then the workload."""
    model = online.models(url)[0]
    prompts = itertools.chain.from_iterable(ask.prompt for ask in wanted)
    long = list(itertools.islice(prompts, ALONE * (CHUNK if isinstance(wanted[0].prompt, str) else 1)))
    whole: tuple[Any, ...] | str = "".join(map(str, long)) if isinstance(wanted[0].prompt, str) else tuple(long)
    uses = itertools.count(number * (REPEATS + 2))
    alone = [
        online.run(url, model, [Ask(prompt=_fresh(whole, next(uses)), tokens=AFTER)])[0] for _ in range(REPEATS + 1)
    ]
    shift = next(uses)
    answers = online.run(url, model, [replace(ask, prompt=_fresh(ask.prompt, shift)) for ask in wanted])
    return {
        **online.summary(answers),
        "ttft_alone": statistics.median(one.ttft for one in alone[1:]),
        "tpot_alone": statistics.median(one.tpot or 0.0 for one in alone[1:]),
    }


def _fresh(prompt: Any, use: int) -> Any:
    """The prompt with another beginning each time."""
    if isinstance(prompt, str):
        return f"{use} {prompt}"
    return (prompt[(1 + use) % len(prompt)], *prompt[1:])


def _median(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in FIGURES}
