"""The engine's side of one HTTP call: its prompts run together, their newest outputs are picked up in one place.

The engine calls it with each output on the event loop; no task stands between the two.

Outputs are cumulative, so only the newest of each prompt is kept: a slow reader costs no memory.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ... import TurnoutError
from ..core.sampling import SamplingParams
from ..outputs import RequestOutput
from .metrics import Metrics
from .protocol import Prompt

if TYPE_CHECKING:
    from ..async_engine import AsyncEngine


class Generation:
    """All engine requests of one call. Used on the event loop only; `close` must be called whatever happens.

    Args:
        engine: where they run.
        prompts: texts or token ids; each is an engine request of its own.
        params: for all of them.
        call_id: the call's id; prompt i has `{call_id}-{i}` in the engine.
        metrics: where they are counted.
        priority, cache_salt: as `Engine.prepare` has them.
    """

    def __init__(
        self,
        engine: "AsyncEngine",
        prompts: Sequence[Prompt],
        params: SamplingParams,
        call_id: str,
        metrics: Metrics,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        self.params = params
        self.outputs: list[RequestOutput | None] = [None] * len(prompts)
        self._engine = engine
        self._priority, self._salt = priority, cache_salt
        self._ids = [f"{call_id}-{i}" for i in range(len(prompts))]
        self._fresh: dict[int, RequestOutput] = {}
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self._watches = {i: metrics.watch(params.n) for i in range(len(prompts))}
        """Of the prompts that have not ended."""
        self.watched = tuple(self._watches.values())
        self._leave: dict[int, Callable[[], None]] = {}
        self._tasks = [self._start(i, prompt) for i, prompt in enumerate(prompts)]

    async def started(self, patience: float) -> None:
        """Return at the first output, or after `patience` seconds; raise what the engine raised until then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._news.wait()
        self._raise()

    async def finished(self) -> list[RequestOutput]:
        """The final output of every prompt, or the first error of any."""
        async for _ in self:
            pass
        return [output for output in self.outputs if output is not None]

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(prompt, its newest output), until all are finished; raises the first error of any."""
        running = True
        while running:  # also when all have ended before the first look: their last outputs are news
            await self._news.wait()
            self._news.clear()
            running = bool(self._watches)
            fresh, self._fresh = self._fresh, {}
            for item in sorted(fresh.items()):
                yield item
            self._raise()

    def abort(self) -> None:
        """Ask the engine to end every request; their last outputs, with finish reason "abort", still arrive."""
        for request_id in self._ids:
            self._engine.abort(request_id)

    def close(self) -> None:
        """Forget the call: the engine aborts what its callers leave, and those outputs are dropped."""
        for task in self._tasks:
            task.cancel()
        for index in [index for index in self._watches if index in self._leave]:
            self._leave[index]()
            self._end(index, asyncio.CancelledError())

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object over all prompts and choices so far."""
        known = [output for output in self.outputs if output is not None]
        prompt = sum(len(output.prompt_token_ids) for output in known)
        completion = sum(len(choice.token_ids) for output in known for choice in output.outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in known)},
        }

    @property
    def first(self) -> float | None:
        """When the first token of any prompt came, on `time.monotonic`."""
        return min((watch.first for watch in self.watched if watch.first), default=None)

    @property
    def reasons(self) -> list[str]:
        """Why each choice of each prompt has ended."""
        return [reason for watch in self.watched for reason in watch.reasons]

    def _start(self, index: int, prompt: Prompt) -> asyncio.Task[None]:
        task = asyncio.create_task(self._submit(index, prompt))
        task.add_done_callback(partial(self._submitted, index))
        return task

    async def _submit(self, index: int, prompt: Prompt) -> None:
        own = (self._ids[index], prompt, self.params, self._priority)
        self._leave[index] = await self._engine.submit(partial(self._take, index), *own, cache_salt=self._salt)

    def _submitted(self, index: int, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self._end(index, error)

    def _take(self, index: int, item: RequestOutput | TurnoutError) -> None:
        """The newest output of a prompt, or the error that ended it; what comes after the call has ended is dropped."""
        watch = self._watches.get(index)
        if watch is None:
            return
        if isinstance(item, TurnoutError):
            self._end(index, item)
            return
        watch.observe(item)
        self.outputs[index] = self._fresh[index] = item
        if item.finished:
            self._end(index, None)
        self._news.set()

    def _end(self, index: int, error: BaseException | None) -> None:
        """A prompt has ended, once."""
        watch = self._watches.pop(index, None)
        if watch is not None:
            watch.end(error)
            self._error = self._error or error
            self._news.set()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
