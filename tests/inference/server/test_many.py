"""Crowds of clients, of whom a fifth leaves and a twentieth reads slowly: no wrong token, and nothing is left of them.

Some make the model give NaN, the queue is full and the pool exhausted meanwhile.

The model is an oracle (`tests.helpers.oracle`), so that every token of every answer is known. The longest form runs
with `--soak MINUTES` only.
"""

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from turnout.inference.choice import Choice
from turnout.inference.core.request import Request
from turnout.inference.outputs import RequestOutput
from turnout.inference.server.generation import Generation
from turnout.inference.server.metrics import Watch
from turnout.tests.helpers.crowd import LEAVES, TEMPERS, Crowd
from turnout.tests.helpers.oracle import Oracle
from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, Running

SEATS = {"max_num_seqs": 32, "max_waiting": 48, "max_num_batched_tokens": 256}
BLOCKS = 136  # one of the longest requests fits, and not much beside it
AT_ONCE = 160  # clients, so that many are refused
STALL = 0.5
MIB = 2**20
HELD = (Request, RequestOutput, Choice, Generation, Watch, asyncio.Task, asyncio.Future)


class Books:
    """What the server's calls came to, by their own account when they ended."""

    def __init__(self, running: Running) -> None:
        self.totals: Counter[str] = Counter()
        self.ended: set[str] = set()
        self._end = running.server.service.end
        running.server.service.end = self._note

    def _note(self, generation: Generation) -> None:
        (output,) = generation.outputs
        usage = generation.usage()
        self._end(generation)
        if output is not None:
            self.ended.add(output.request_id.rpartition("-")[0])
        self.totals["calls"] += 1
        self.totals["prompt_tokens_total"] += usage["prompt_tokens"]
        self.totals["generation_tokens_total"] += usage["completion_tokens"]
        self.totals["requests_total{outcome=ok}"] += output is not None and output.finished
        self.totals["time_to_first_token_seconds_count"] += usage["completion_tokens"] > 0


def census(running: Running) -> Counter[str]:
    """What a server may hold: its tasks, the process's threads and sockets, and objects of requests.

    The threads in which prompts are prepared come one by one and stay.
    """

    async def tasks() -> int:
        return len(asyncio.all_tasks()) - 1

    gc.collect()
    kinds = Counter(type(thing) for thing in gc.get_objects())
    found = Counter({kind.__name__: kinds[kind] for kind in HELD})
    found["tasks"] = asyncio.run_coroutine_threadsafe(tasks(), running.loop).result(30)
    found["threads"] = sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())
    found["sockets"] = sum(name.startswith("socket:") for name in _open_files())
    return found


def _open_files() -> Iterator[str]:
    for path in Path("/proc/self/fd").iterdir():
        try:
            yield os.readlink(path)
        except FileNotFoundError:
            continue


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_whole(running: Running) -> None:
    """Every block is free or cached, none in use, and the engine knows of no request."""
    engine = running.engine
    pool = Counter(engine.blocks.free) + Counter(list(engine.blocks.prefix.idle))
    assert pool == Counter(range(1, engine.blocks.num_usable + 1))
    assert not any(engine.blocks.counts)
    assert not engine._ledger.choices
    assert not engine.scheduler.requests


@pytest.fixture
def meet(serve, make_model) -> Callable[..., None]:
    """Serve crowds of `count` clients, one after another until `seconds` are over; each leaves nothing behind."""

    def play(count: int, seconds: float = 0.0, growth: int | None = None) -> None:
        model = make_model(layers=1, moe=None, max_seq_len=8192, eos_token_id=0)
        running = serve(of=model, server={"stall_seconds": STALL}, num_blocks=BLOCKS, **SEATS)
        books = Books(running)
        crowd = Crowd(running.url, NAME, Oracle(running.engine), books.ended.__contains__)

        def come(count: int, seed: int) -> None:
            asyncio.run(crowd.come(count, seed, AT_ONCE))
            asyncio.run(crowd.visit("whole", random.Random(seed)))  # what is held of the last step is of this one
            assert eventually(running.idle)
            books.ended.clear()

        come(60, seed=0)
        before, memory, until = census(running), resident(), time.monotonic() + seconds
        for seed in range(1, 10**6):
            come(count, seed)
            assert eventually(lambda: census(running) <= before), census(running) - before
            assert_whole(running)
            assert growth is None or resident() - memory < growth
            if time.monotonic() >= until:
                break
        assert_exact(running, crowd, books.totals)
        assert set(crowd.seen) >= {*TEMPERS, "refused"}

    return play


def assert_exact(running: Running, crowd: Crowd, totals: Counter[str]) -> None:
    """The server's metrics are what its calls came to, and what the clients saw."""
    metrics, seen = running.metrics(), crowd.seen
    for name in totals.keys() - {"calls"}:
        assert metrics[name] == totals[name], name
    outcomes = {outcome: metrics[f"requests_total{{outcome={outcome}}}"] for outcome in ("ok", "abort", "error")}
    assert sum(outcomes.values()) == totals["calls"]
    assert outcomes["ok"] == seen["finished"]
    assert running.engine.stats().preemptions
    unseen = seen["at once"] + seen["waiting"]
    failed = seen["refused"] + seen["poisoned"]
    assert failed <= outcomes["error"] <= failed + unseen
    known = seen["streaming"] + seen["half-closed"] + seen["stalled"]
    assert known <= outcomes["abort"] <= known + unseen
    assert metrics["generation_tokens_total"] >= seen["tokens"]
    assert sum(seen[temper] for temper in LEAVES) >= sum(seen[temper] for temper in TEMPERS) // 8


def test_2000_streams_of_clients_that_stay_leave_or_dawdle(meet):
    meet(2000, growth=64 * MIB)


@pytest.mark.full
def test_10000_streams_of_clients_that_stay_leave_or_dawdle(meet):
    meet(10_000, growth=64 * MIB)


@pytest.mark.soak
def test_10000_streams_again_and_again(meet, request):
    meet(10_000, seconds=60 * request.config.getoption("--soak"), growth=64 * MIB)
