"""Real servers on free loopback ports: a real engine over a small model, in a thread of the test process."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from turnout.inference.async_engine import AsyncEngine
from turnout.inference.config import EngineConfig
from turnout.inference.engine import Engine
from turnout.inference.outputs import RequestOutput
from turnout.inference.server.config import ServerConfig
from turnout.inference.server.lifecycle import Server, bind
from turnout.inference.text.tokenizer import TextTokenizer
from turnout.moe import Decoder
from turnout.tests.helpers.waiting import eventually

NAME = "tiny"
SLOW = 0.1
"""Seconds before each step: what runs a hundred of them is still there when a busy machine has come round to look."""
ENGINE = {"num_blocks": 256, "max_num_seqs": 16, "max_num_batched_tokens": 64}


class PacedEngine(Engine):
    """The engine, but a test can hold it between two steps, slow it down, or let its next step fail."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.pace = 0.0
        self.crash: Exception | None = None

    def step(self) -> list[RequestOutput]:
        self.gate.wait()
        time.sleep(self.pace)
        if self.crash is not None:
            raise self.crash
        return super().step()


@dataclass
class Running:
    """A server that runs in a thread."""

    url: str
    server: Server
    engine: PacedEngine
    loop: asyncio.AbstractEventLoop
    ended: Future[None]
    http: httpx.Client
    clients: ExitStack = field(default_factory=ExitStack)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)

    def client(self, **options: Any) -> openai.OpenAI:
        """One that is closed with the server."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | options))
        return self.clients.enter_context(client)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json={"model": NAME} | body)

    def stream(self, path: str = "/v1/completions", **body: Any) -> list[Any]:
        """The JSON of every data frame; a last `[DONE]` comes as the text."""
        with self.http.stream("POST", path, json={"model": NAME, "stream": True} | body) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            raw = answer.read().decode()
        assert raw.endswith("\n\n")
        frames = [frame.removeprefix("data: ") for frame in raw.split("\n\n") if frame and not frame.startswith(":")]
        return [frame if frame == "[DONE]" else json.loads(frame) for frame in frames]

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def metrics(self) -> dict[str, float]:
        """Sample name, with its labels in braces but for the model's name, → value."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                assert sample.labels.pop("model_name") == NAME
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                found[sample.name.removeprefix("turnout:") + (f"{{{labels}}}" if labels else "")] = sample.value
        return found

    def idle(self) -> bool:
        stats = self.engine.stats()
        return (stats.running, stats.waiting, stats.usage) == (0, 0, 0.0) and not self.server.service.calls


Serve = Callable[..., Running]


@contextmanager
def run_server(model: Decoder, tokenizer: TextTokenizer, settings: dict[str, Any], **engine: Any) -> Iterator[Running]:
    """A running server; with `loading` (an event) one that is still loading until the event is set."""
    loading = engine.pop("loading", None)
    built = PacedEngine(model, tokenizer, EngineConfig(**(ENGINE | engine)))
    config = ServerConfig(**({"port": 0, "drain_seconds": 60.0} | settings))
    listener, url = bind(config)
    ready: threading.Event = threading.Event()
    started: Future[tuple[Server, asyncio.AbstractEventLoop]] = Future()

    def load() -> AsyncEngine:
        if loading is not None:
            loading.wait()
        engine = AsyncEngine(built)
        engine.start()
        return engine

    async def run() -> None:
        server = Server(config, NAME, load)
        started.set_result((server, asyncio.get_running_loop()))
        await server.run(listener, ready.set)

    with ThreadPoolExecutor(1) as executor:
        ended = executor.submit(asyncio.run, run())
        ended.add_done_callback(lambda _: ready.set())
        server, loop = started.result(30)
        http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        running = Running(url, server, built, loop, ended, http)
        assert loading is not None or ready.wait(30)
        try:
            yield running
        finally:
            built.gate.set()
            running.clients.close()
            if not ended.done():
                running.stop()
            ended.exception(30)
            http.close()


@pytest.fixture(scope="session")
def served(model: Decoder, byte_level: TextTokenizer) -> Iterator[Running]:
    """One server for all tests that leave it as they found it."""
    with run_server(model, byte_level, {}) as running:
        yield running
        assert eventually(running.idle)
    assert running.ended.exception() is None


@pytest.fixture
def serve(model: Decoder, byte_level: TextTokenizer) -> Iterator[Serve]:
    """Servers of a test's own: `serve(of=model, server={...}, **engine settings)`; they end idle."""
    with ExitStack() as stack:

        def start(of: Decoder | None = None, server: dict[str, Any] | None = None, **engine: Any) -> Running:
            return stack.enter_context(run_server(of or model, byte_level, server or {}, **engine))

        yield start
