"""The engine in a thread of its own, for asyncio: many callers, one owner of model and requests.

Callers put commands into an inbox and wait; the thread takes them between steps and sends outputs back through the
callers' event loops, which it wakes once a step. Outputs are cumulative, so a slow caller keeps only the newest. Every
request gets exactly one last output, or one error; when the thread dies, all that wait learn the root cause.
"""

import asyncio
import contextlib
import queue
import threading
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from functools import partial

from .. import TurnoutError
from .core.sampling import SamplingParams
from .engine import Engine
from .errors import EngineStoppedError
from .faults import step_error
from .outputs import FailedOutput, RequestOutput
from .prepare import Prepared, Prompt
from .ranks import Ranks
from .rehearsal import FIRST_TOKENS
from .stats import EngineStats
from .watchdog import Watchdog

Item = RequestOutput | TurnoutError
"""What a caller gets: an output, or the error that ended its request, after which nothing comes."""


@dataclass(frozen=True, eq=False)
class _Stream:
    """Where one request's outputs go: a function that is called on an event loop."""

    loop: asyncio.AbstractEventLoop
    take: Callable[[Item], None]


class _Mailbox:
    """The newest output for a caller who comes for it; only its event loop touches it."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._latest: Item | None = None

    def put(self, item: Item) -> None:
        self._latest = item
        self._news.set()

    async def get(self) -> RequestOutput:
        """The newest output that was not taken yet; raises the error that ended the request."""
        await self._news.wait()
        self._news.clear()
        item, self._latest = self._latest, None
        if isinstance(item, TurnoutError):
            raise item
        assert item is not None, "news without an item"
        return item


class AsyncEngine:
    """An `Engine` for concurrent callers. Its methods may be called from any event loop.

    Args:
        engine: nobody else may use it from now on.

    Attributes:
        tokenizer, chat, config, model_config, timeline, pools: the engine's; read-only.
        routed: the layers of which `routed_experts` tells; none in a dense model.
    """

    def __init__(self, engine: Engine) -> None:
        self.tokenizer = engine.tokenizer
        self.chat = engine.chat
        self.config = engine.config
        self.model_config = engine.model_config
        self.timeline, self.pools = engine.timeline, engine.pools
        self.routed = engine.runner.pages.layers
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # the thread's
        self._stats = engine.stats()
        self._door = threading.Lock()  # nothing enters the inbox once `_stopped` says why
        self._stopped: str | None = None
        self._stopping = False
        self._stalled = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="turnout-engine", daemon=True)
        self._watchdog = Watchdog(engine.config.watchdog_seconds, self._stall)

    @property
    def healthy(self) -> bool:
        """The thread runs and takes requests."""
        return self._thread.is_alive() and self._stopped is None

    def start(self) -> None:
        """Start the thread, once. Another one fetches memory for the first tokens meanwhile, and ends."""
        self._thread.start()
        fetch = partial(self._engine.runner.cache.populate, FIRST_TOKENS)
        threading.Thread(target=fetch, name="turnout-memory", daemon=True).start()
        self._watchdog.start()
        if self._engine.ranks is not None:
            self._engine.ranks.when_lost(partial(self._lose, self._engine.ranks))

    def shutdown(self, timeout: float | None = None) -> None:
        """Abort what still runs, after the step at hand, and join the thread, unless it has stalled. Idempotent.

        Args:
            timeout: seconds to wait for the thread; None = until it is done.
        """
        with contextlib.suppress(EngineStoppedError):
            self._send(self._stop)
        if self._thread.ident is not None:
            self._closed.wait(timeout)
            if not self._stalled:
                self._thread.join(timeout)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        *,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Run a request and yield its cumulative outputs; the last one is `finished`.

        Leaving the iteration early aborts the request. Intermediate outputs may be skipped when the caller is slow.
        The arguments are those of `Engine.prepare`.

        Raises:
            RequestError: it can not be served as asked. QueueFullError: too many wait. QueueTimeoutError: it waited
            too long. NonFiniteError: its logits are not finite. EngineStoppedError: the engine is down.
        """
        name, box, finished = request_id or uuid.uuid4().hex, _Mailbox(), False
        leave = await self.submit(box.put, name, prompt, params, priority, deadline=deadline, cache_salt=cache_salt)
        try:
            while not finished:
                output = await box.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                leave()

    async def submit(
        self,
        take: Callable[[Item], None],
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        *,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> Callable[[], None]:
        """`generate` for a caller who does not wait: no task of its own is woken for each token.

        Args:
            take: called on this event loop with every output, and once with the error if one ends the request; it
                must not raise.

        Returns:
            What the caller calls, once, to leave before the end: aborts the request. Outputs may still come.

        Raises:
            RequestError: as `generate`, before `take` is called. EngineStoppedError: the engine is down.
        """
        prepare = partial(self._engine.prepare, deadline=deadline, cache_salt=cache_salt)
        prepared = await asyncio.to_thread(prepare, request_id, prompt, params, priority)
        stream = _Stream(asyncio.get_running_loop(), take)
        self._send(partial(self._add, prepared, stream))
        return partial(self._leave, request_id, stream)

    def abort(self, request_id: str) -> None:
        """End a request; its last output, with finish reason "abort", still comes. Unknown ids are no error."""
        with contextlib.suppress(EngineStoppedError):
            self._send(partial(self._abort, request_id))

    def stats(self) -> EngineStats:
        """As of the last step."""
        return self._stats

    def _leave(self, request_id: str, stream: _Stream) -> None:
        """Abort a request that is still this caller's."""
        with contextlib.suppress(EngineStoppedError):
            self._send(partial(self._abort, request_id, stream))

    def _send(self, command: Callable[[], None]) -> None:
        with self._door:
            if self._stopped is not None:
                raise EngineStoppedError(self._stopped)
            self._inbox.put(command)

    def _lose(self, ranks: Ranks) -> None:
        """A rank is lost, which nobody may be waiting for just now."""
        with contextlib.suppress(EngineStoppedError):
            self._send(ranks.check)

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        reason = "the engine was shut down"
        try:
            while not self._stopping:
                self._take_commands()
                if self._engine.has_unfinished:
                    self._watchdog.begin()
                    outputs = self._engine.step()
                    self._watchdog.end()
                    if self._stalled:
                        return  # too late: nobody waits any more
                    self._stats = self._engine.stats()  # before anybody sees the outputs
                    self._publish(outputs)
        except BaseException as error:
            reason = f"the engine crashed: {type(error).__name__}: {error}"
            raise  # the traceback goes to stderr through threading's hook
        finally:
            self._watchdog.stop()
            self._close(reason)
            self._engine.close()

    def _take_commands(self) -> None:
        """Run what is in the inbox; wait for it when there is nothing else to do."""
        while not self._stopping:
            try:
                command = self._inbox.get(block=not self._engine.has_unfinished)
            except queue.Empty:
                return
            command()
            self._stats = self._engine.stats()

    def _add(self, prepared: Prepared, stream: _Stream) -> None:
        try:
            self._engine.add(prepared)
        except TurnoutError as error:
            self._deliver([(stream, error)])
        except Exception as error:  # noqa: BLE001  (one request's fault is not the engine's)
            self._deliver([(stream, step_error(error))])
        else:
            self._streams[prepared.request_id] = stream

    def _abort(self, request_id: str, stream: _Stream | None = None) -> None:
        """`stream` names the caller that left: a request of the same id that is not its own goes on."""
        if stream is None or self._streams.get(request_id) is stream:
            output = self._engine.abort(request_id)
            self._publish([] if output is None else [output])

    def _stop(self) -> None:
        self._stopping = True
        self._publish(self._engine.abort_all())

    def _publish(self, outputs: Iterable[RequestOutput]) -> None:
        mail = []
        for output in outputs:
            stream = self._streams[output.request_id]
            if output.finished:
                del self._streams[output.request_id]
            failed = output.error if isinstance(output, FailedOutput) else None
            mail.append((stream, failed or output))
        self._deliver(mail)

    def _deliver(self, mail: Iterable[tuple[_Stream, Item]]) -> None:
        by_loop = defaultdict(list)
        for stream, item in mail:
            by_loop[stream.loop].append((stream.take, item))
        for loop, items in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits any more
                loop.call_soon_threadsafe(_put_all, items)

    def _close(self, reason: str) -> None:
        """Refuse new commands, then tell everyone who waits or has just asked; the first reason stays."""
        with self._door:
            if self._stopped is not None:
                return
            self._stopped = f"{reason}: start it again"
        waiting = list(self._streams.values())
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, partial) and command.func == self._add:
                waiting.append(command.args[1])
        self._deliver([(stream, EngineStoppedError(self._stopped)) for stream in waiting])
        self._streams.clear()
        self._closed.set()

    def _stall(self) -> None:
        """What the watchdog does, in its thread: the engine's own is stuck."""
        self._stalled = True
        seconds = self.config.watchdog_seconds
        self._close(
            f"the engine stalled: a step took longer than watchdog_seconds ({seconds:g} s), see the stacks above"
        )


def _put_all(items: Iterable[tuple[Callable[[Item], None], Item]]) -> None:
    for take, item in items:
        take(item)
