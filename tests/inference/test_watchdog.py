"""An engine that does not come back from a step: everyone who waits is told, and the stacks are there to be read."""

import asyncio
import threading
import time

import pytest

from turnout.inference.async_engine import AsyncEngine
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.errors import EngineStoppedError
from turnout.inference.watchdog import Watchdog

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


class HeldForward:
    """The runner's forward pass; from call `after` on it waits for `go`."""

    def __init__(self, engine: Engine, after: int) -> None:
        self.go, self._after = threading.Event(), after
        self._forward = engine.runner.forward
        engine.runner.forward = self

    def __call__(self, plan):
        self._after -= 1
        if self._after < 0:
            self.go.wait()
        return self._forward(plan)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_hangs_fails_everyone_and_shows_the_stacks(make_engine, capfd, overlap):
    inner = make_engine(overlap=overlap, max_num_seqs=2, watchdog_seconds=0.5)
    held = HeldForward(inner, after=4)
    engine = AsyncEngine(inner)

    async def one(prompt: list[int]) -> None:
        async for _ in engine.generate(prompt, LONG):
            pass

    async def main() -> None:
        engine.start()
        waiting = [asyncio.create_task(one([i + 1])) for i in range(5)]
        while engine.healthy and engine.stats().steps < 2:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(30):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [EngineStoppedError] * 5
        assert "a step took longer than watchdog_seconds (0.5 s)" in str(results[0])
        with pytest.raises(EngineStoppedError, match="stalled"):
            await one([9])

    asyncio.run(main())
    assert not engine.healthy
    engine.shutdown()  # does not wait for the step
    stacks = capfd.readouterr().err
    assert "in __call__" in stacks
    assert "test_watchdog.py" in stacks
    held.go.set()
    engine._thread.join(30)
    assert not engine._thread.is_alive(), "a step that comes back after all ends the thread"
    inner.abort_all()
    while inner.has_unfinished:
        inner.step()


def test_an_idle_engine_and_one_that_works_slowly_are_left_alone(make_engine):
    inner = make_engine(watchdog_seconds=1.0)
    real = inner.step

    def step():
        time.sleep(0.06)
        return real()

    inner.step = step
    engine = AsyncEngine(inner)

    async def main() -> None:
        engine.start()
        await asyncio.sleep(1.5)
        params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)
        outputs = [output async for output in engine.generate([1, 2], params)]
        assert len(outputs[-1].outputs[0].token_ids) == 25

    asyncio.run(main())
    assert engine.healthy
    engine.shutdown()


def test_the_alarm_comes_once_and_not_after_the_step():
    alarms = []
    watchdog = Watchdog(0.2, lambda: alarms.append(time.monotonic()))
    watchdog.start()
    watchdog.begin()
    watchdog.end()
    time.sleep(0.5)
    assert not alarms
    watchdog.begin()
    watchdog._thread.join(10)
    assert len(alarms) == 1
