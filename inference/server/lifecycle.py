"""One server process from bind to exit.

The port is bound first and answers at once (`/health` 503) while the engine loads. SIGTERM or SIGINT: new requests get
503, those in flight may finish for `drain_seconds`, then they end as "abort". A second signal ends the process on the
spot, and so does one while loading, when nothing is in flight.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import uvicorn

from ... import ConfigError
from ..core.sampling import SamplingParams
from .app import create_app
from .config import ServerConfig
from .connection import Connections
from .service import Service

if TYPE_CHECKING:
    from ..async_engine import AsyncEngine

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ABORT_SECONDS = 5.0  # how long aborted requests may take to send their last words
POLL_SECONDS = 0.05
BROKEN_SECONDS = 1.0  # how long `/health` says so before the port is closed


class _Uvicorn(uvicorn.Server):
    """Signals are ours: uvicorn would close the port at the first one, and load balancers need their 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(config: ServerConfig) -> tuple[socket.socket, str]:
    """Take the port; return its socket and the server's URL.

    Raises:
        ConfigError: the port is taken, or the address is not ours.
    """
    host, port = config.host, config.port
    listener = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port ({port}) is taken on {host}: stop the other server or use port=0") from error
        raise ConfigError(f"host ({host}) and port ({port}) can not be bound ({error}): choose others") from error
    name = f"[{host}]" if ":" in host else host
    return listener, f"http://{name}:{listener.getsockname()[1]}"


class Server:
    """Serves one engine on a bound socket. `stop` may be called by whatever runs on its event loop.

    Args:
        config: how long to wait.
        model_name: the one model's name in requests.
        load: makes the engine, started; it runs in a thread.
    """

    def __init__(self, config: ServerConfig, model_name: str, load: Callable[[], "AsyncEngine"]) -> None:
        self.service = Service(config, model_name)
        self.connections = Connections(config, self.service.metrics.refused)
        self._config = config
        self._load = load
        self._stopping = asyncio.Event()

    async def run(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serve until stopped, then close the socket. `on_ready` is called once requests are taken.

        Raises:
            EngineStoppedError: the engine crashed. Whatever `load` raises.
        """
        http = _Uvicorn(
            uvicorn.Config(
                create_app(self.service),
                http=self.connections,  # type: ignore[arg-type]  # uvicorn calls it as it would a class
                ws="none",
                lifespan="off",
                proxy_headers=False,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(ABORT_SECONDS),
            )
        )
        serving = asyncio.create_task(http.serve([listener]))
        try:
            await self._serve(on_ready)
        finally:
            http.should_exit = True
            await serving
            if self.service.engine is not None:
                self.service.engine.shutdown(ABORT_SECONDS)
            if self.service.traces is not None:
                await asyncio.to_thread(self.service.traces.close)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Signals are the server's while this lasts, also before `run` and after it; for the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Begin to shut down: drain, then end."""
        self._stopping.set()

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        service = self.service
        # The thread ends, and its OpenMP workers with it: with more of them than cores, those of the engine's thread
        # would sleep between any two kernels instead of waiting awake.
        with ThreadPoolExecutor(1, "turnout-load") as loader:
            service.engine = engine = await asyncio.get_running_loop().run_in_executor(loader, self._load)
        service.phase = "ready"
        on_ready()
        while not self._stopping.is_set():
            service.history.look(engine.stats().routing)
            await asyncio.sleep(POLL_SECONDS)
            await self._check(engine)
        service.phase = "shutting down"
        await self._idle(self._config.drain_seconds)
        for call in service.calls:
            call.abort()
        await self._idle(ABORT_SECONDS)
        await self._check(engine)

    async def _check(self, engine: "AsyncEngine") -> None:
        """Raise the root cause if the engine has crashed."""
        if not engine.healthy:
            self.service.phase = "broken"
            await asyncio.sleep(BROKEN_SECONDS)
            await anext(engine.generate([0], SamplingParams()))

    async def _idle(self, patience: float) -> None:
        """Return when no call is in flight, or after `patience` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self.service.calls:
                    await asyncio.sleep(POLL_SECONDS)

    def _on_signal(self, number: int, _: object) -> None:
        if self.service.phase == "loading":
            os._exit(0)
        if self._stopping.is_set():
            os._exit(128 + number)
        self.stop()
