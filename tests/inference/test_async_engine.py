"""The engine's thread: many callers, exactly one end for each request, whatever happens."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from turnout import NonFiniteError, RequestError, TurnoutError
from turnout.inference.async_engine import AsyncEngine
from turnout.inference.config import EngineConfig
from turnout.inference.core.request import QueueFullError
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.errors import EngineStoppedError
from turnout.inference.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def serve(make_engine):
    """Run a coroutine function with a started engine; the thread is gone afterwards."""

    def run(client, of: Engine | None = None, **config) -> None:
        engine = AsyncEngine(of or make_engine(**config))

        async def main() -> None:
            engine.start()
            try:
                async with asyncio.timeout(600):
                    await client(engine)
            finally:
                engine.shutdown()

        asyncio.run(main())
        assert not engine._thread.is_alive()
        assert not engine.healthy
        assert not engine._streams

    return run


@contextmanager
def slowly(engine: AsyncEngine) -> Iterator[None]:
    """Steps take 0.05 s longer: what is long is still there when a busy machine has come round to look."""
    hurry, step = threading.Event(), engine._engine.step

    def paced() -> list[RequestOutput]:
        hurry.wait(0.05)
        return step()

    engine._engine.step = paced
    yield
    hurry.set()


async def last(engine: AsyncEngine, prompt, params=GREEDY, request_id=None) -> RequestOutput:
    outputs = [output async for output in engine.generate(prompt, params, request_id)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


async def idle(engine: AsyncEngine) -> None:
    """Until the engine holds nothing."""
    while (stats := engine.stats()).running or stats.waiting or stats.usage:
        await asyncio.sleep(0.002)


def test_concurrent_callers_get_what_each_gets_alone(serve, make_engine):
    prompts = [list(range(1 + i, 5 + 3 * i)) for i in range(24)]
    alone = make_engine()

    async def client(engine: AsyncEngine) -> None:
        outputs = await asyncio.gather(*(last(engine, prompt) for prompt in prompts))
        for prompt, output in zip(prompts, outputs, strict=True):
            alone.add_request("x", prompt, GREEDY)
            while alone.has_unfinished:
                expected = alone.step()
            assert output.outputs == expected[0].outputs
        assert engine.stats().steps < 24 * 12, "they shared steps"

    serve(client)


def test_outputs_are_cumulative_and_a_slow_caller_skips_but_loses_nothing(serve):
    async def client(engine: AsyncEngine) -> None:
        stream = engine.generate([1, 2, 3], LONG)
        first = (await anext(stream)).outputs[0]
        await idle(engine)  # this caller reads nothing until everything is done
        (rest,) = [output.outputs[0] async for output in stream]
        assert len(rest.token_ids) == 200
        assert rest.token_ids[: len(first.token_ids)] == first.token_ids
        assert rest.text.startswith(first.text)

    serve(client)


def test_leaving_the_iteration_aborts_the_request(serve):
    async def client(engine: AsyncEngine) -> None:
        with slowly(engine):
            stream = engine.generate([1, 2, 3], LONG)
            await anext(stream)
            await stream.aclose()
            await idle(engine)
            task = asyncio.create_task(last(engine, [1, 2, 3], LONG))
            while not engine.stats().running:
                await asyncio.sleep(0.002)
            task.cancel()
            await idle(engine)
        assert engine.stats().computed_tokens < 2 * 200
        assert (await last(engine, [4])).finished

    serve(client)


def test_an_abort_by_id_still_delivers_the_end(serve):
    async def client(engine: AsyncEngine) -> None:
        with slowly(engine):
            task = asyncio.create_task(last(engine, [1, 2, 3], LONG, "mine"))
            while not engine.stats().running:
                await asyncio.sleep(0.002)
            engine.abort("mine")
            engine.abort("mine")
            engine.abort("unknown")
            assert (await task).outputs[0].finish_reason == "abort"
        await idle(engine)

    serve(client)


def test_a_refused_request_raises_at_its_caller_only(serve):
    async def client(engine: AsyncEngine) -> None:
        with slowly(engine):
            healthy = asyncio.create_task(last(engine, [1, 2, 3], LONG, "taken"))
            while not engine.stats().running:
                await asyncio.sleep(0.002)
            for prompt, params, name, message in (
                ([999], GREEDY, None, "token ids from 0"),
                ([1] * 256, GREEDY, None, "max_model_len"),
                ([1], GREEDY, "taken", "must be new"),
            ):
                with pytest.raises(RequestError, match=message):
                    await last(engine, prompt, params, name)
            with pytest.raises(QueueFullError):
                await last(engine, [1], SamplingParams(n=9))
        assert len((await healthy).outputs[0].token_ids) == 200

    serve(client, max_waiting=8)


def test_logits_that_are_not_finite_raise_at_their_caller_only(serve, make_model, make_engine):
    model = make_model()
    model.embed.weight[300] = float("nan")

    async def client(engine: AsyncEngine) -> None:
        results = await asyncio.gather(last(engine, [300]), last(engine, [1]), return_exceptions=True)
        assert isinstance(results[0], NonFiniteError)
        assert results[1].finished
        assert engine.healthy

    serve(client, of=make_engine(model))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_tells_everyone_who_waits_the_root_cause(model, byte_level):
    engine = AsyncEngine(Engine(model, byte_level, EngineConfig(num_blocks=64, max_num_seqs=8)))

    async def main() -> None:
        engine.start()
        with slowly(engine):
            waiting = [asyncio.create_task(last(engine, [i + 1], LONG)) for i in range(12)]
            while engine.stats().steps < 3:
                await asyncio.sleep(0.002)
            engine._engine.runner.cache.keys = engine._engine.runner.cache.keys[:, :0]  # the memory is gone
        async with asyncio.timeout(10):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(result) for result in results} == {EngineStoppedError}
        assert all("the engine crashed: " in str(result) and "Error: " in str(result) for result in results)
        with pytest.raises(EngineStoppedError, match="crashed"):
            await last(engine, [1])

    asyncio.run(main())
    engine.shutdown()
    assert not engine.healthy


def test_shutdown_ends_what_runs_and_refuses_what_comes(make_engine):
    engine = AsyncEngine(make_engine())

    async def main() -> None:
        early = asyncio.create_task(last(engine, [1], LONG))
        await asyncio.sleep(0.05)
        with slowly(engine):
            engine.start()
            assert engine.healthy
            late = asyncio.create_task(last(engine, [2], LONG))
            while engine.stats().running < 2:
                await asyncio.sleep(0.002)
            engine.shutdown()
        assert [output.outputs[0].finish_reason for output in await asyncio.gather(early, late)] == ["abort", "abort"]
        with pytest.raises(EngineStoppedError, match="shut down"):
            await last(engine, [1])

    asyncio.run(main())
    engine.shutdown()


def test_the_first_tokens_find_their_memory_there(serve, make_model, make_engine):
    engine = make_engine(make_model().double(), num_blocks=2048)  # 2 MiB of keys a layer for the first tokens
    before = resident()

    async def client(engine: AsyncEngine) -> None:
        while resident() - before < 14 << 20:
            await asyncio.sleep(0.002)
        assert engine.stats().steps == 0

    serve(client, of=engine)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_caller_without_a_task_gets_every_end_and_may_leave(serve):
    async def client(engine: AsyncEngine) -> None:
        taken: list[RequestOutput | TurnoutError] = []
        await engine.submit(taken.append, "a", [1, 2, 3], GREEDY)
        with pytest.raises(RequestError, match="token ids from 0"):
            await engine.submit(taken.append, "b", [999], GREEDY)
        while not any(isinstance(item, RequestOutput) and item.finished for item in taken):
            await asyncio.sleep(0.002)
        assert [item.finished for item in taken if isinstance(item, RequestOutput)] == [False] * 11 + [True]
        twice: list[RequestOutput | TurnoutError] = []
        with slowly(engine):
            leave = await engine.submit(taken.append, "c", [1, 2], LONG)
            await engine.submit(twice.append, "c", [1, 2], GREEDY)
            while not twice:
                await asyncio.sleep(0.002)
            assert isinstance(twice[0], RequestError)
            leave()
            await idle(engine)
        assert engine.stats().computed_tokens < 200

    serve(client)


def test_callers_in_two_event_loops_are_served_by_one_engine(make_engine):
    engine = AsyncEngine(make_engine())
    engine.start()
    first, second = (asyncio.run(last(engine, [3, 4])) for _ in range(2))
    assert first.outputs == second.outputs
    engine.shutdown()
