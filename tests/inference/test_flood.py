"""Far more requests than fit: the queue is bounded, who is refused may come again, and nobody gets wrong tokens."""

import asyncio
import itertools
import random
from collections.abc import Callable

import pytest

from turnout.inference.async_engine import AsyncEngine
from turnout.inference.core.request import QueueFullError
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine

PROMPTS = [list(range(1 + i, 3 + i + i % 37)) for i in range(60)]
SIZES = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "num_blocks": 160}


def params(i: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=1 + i % 3, ignore_eos=True)


def alone(engine: Engine) -> list[list[int]]:
    """The three tokens of every prompt, by itself."""
    found = []
    for prompt in PROMPTS:
        engine.add_request("x", prompt, params(2))
        while engine.has_unfinished:
            for output in engine.step():
                last = output
        found.append(last.outputs[0].token_ids)
    return found


async def ask(engine: AsyncEngine, i: int, refusals: list[int]) -> list[int]:
    """Ask until it is admitted, as a client does that was told to try again."""
    rng = random.Random(i)
    for tries in itertools.count(1):
        try:
            async for output in engine.generate(PROMPTS[i % len(PROMPTS)], params(i), priority=i % 2):
                last = output
        except QueueFullError:
            refusals.append(i)
            await asyncio.sleep(tries * rng.uniform(0.2, 2.0))
        else:
            return last.outputs[0].token_ids


async def watch(engine: AsyncEngine, waiting: list[int]) -> None:
    while True:
        waiting.append(engine.stats().waiting)
        await asyncio.sleep(0.01)


def flood(make_engine: Callable[..., Engine], count: int) -> None:
    engine, expected = make_engine(**SIZES, max_waiting=count // 5), alone(make_engine())
    served, refusals, waiting = AsyncEngine(engine), [], []

    async def main() -> list[list[int]]:
        served.start()
        watcher = asyncio.create_task(watch(served, waiting))
        answers = await asyncio.gather(*(ask(served, i, refusals) for i in range(count)))
        watcher.cancel()
        return answers

    answers = asyncio.run(main())
    served.shutdown()
    assert len(answers) == count
    for i, tokens in enumerate(answers):
        assert tokens == expected[i % len(PROMPTS)][: 1 + i % 3]
    assert refusals, "the queue is bounded"
    assert max(waiting) <= count // 5


def test_a_thousand_requests_at_once(make_engine):
    flood(make_engine, 1000)


@pytest.mark.full
def test_ten_thousand_requests_at_once(make_engine):
    flood(make_engine, 10_000)
