"""G6 after 200 requests, of which some finish, some are refused, some fail, and some are left in every phase: their
clients keep count, and every counter of the server must say the same."""
# ruff: noqa: N802 (G6 is the name of a rule)

import json
import random
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from turnout.inference.core.request import Request
from turnout.inference.outputs import RequestOutput
from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, Running

ENDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "two": {"n": 2},
    "stream": {"stream": True, "stream_options": {"include_usage": True}},
    "stopped": {"stop": ["e", "a", "t", " "], "max_tokens": 30},
    "refused": {"prompt": [321]},
    "fails": {"stop_token_ids": [5], "allowed_token_ids": [5], "min_tokens": 2, "max_tokens": 4},
}
"""The last one excludes every token, which only the sampler finds out."""
LEAVING = 40
"""The `max_tokens` of those that leave, and of no others."""
LEAVES: dict[str, dict[str, Any]] = {
    "waiting": {"max_tokens": LEAVING},
    "in its prompt": {"prompt": list(range(3, 203)), "max_tokens": LEAVING},
    "with tokens": {"stream": True, "max_tokens": LEAVING},
}
WAVES = [*LEAVES, None] * 2 + ["with tokens", None]
SIZE = 20


@dataclass
class Client:
    """A connection with one request, and what it has been told."""

    body: dict[str, Any]
    socket: socket.socket
    data: bytes = b""
    tokens: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @classmethod
    def send(cls, served: Running, rng: random.Random, kind: dict[str, Any]) -> "Client":
        prompt = [rng.randrange(3, 300) for _ in range(rng.randrange(1, 30))]
        body = {"model": NAME, "prompt": prompt, "max_tokens": rng.randrange(1, 9), "logprobs": 0} | kind
        text = json.dumps(body).encode()
        host, port = served.url.removeprefix("http://").split(":")
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        client = socket.create_connection((host, int(port)), timeout=30)
        client.sendall(head.encode() + text)
        return cls(body, client)

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1]) if self.data else 0

    @property
    def frames(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in re.findall(rb"data: (\{.*?\})\n\n", self.data)]

    def read(self) -> bool:
        more = self.socket.recv(65536)
        self.data += more
        return bool(more)

    def count(self) -> int:
        self.tokens = sum(len(choice["logprobs"]["tokens"]) for frame in self.frames for choice in frame["choices"])
        return self.tokens

    def leave(self, served: Running) -> None:
        """Go, having read all that was computed."""
        if self.body.get("stream"):
            while not self.frames:
                assert self.read()
            computed = served.engine.scheduler.requests[f"{self.frames[0]['id']}-0#0"].num_output_tokens
            while self.count() < computed:
                assert self.read()
        self.socket.close()

    def finish(self) -> None:
        """Read to the end."""
        while self.read():
            pass
        self.socket.close()
        if self.status == 200:
            frames = self.frames if self.body.get("stream") else [json.loads(self.data.partition(b"\r\n\r\n")[2])]
            self.usage, self.tokens = frames[-1]["usage"], frames[-1]["usage"]["completion_tokens"]
            self.reasons = [c["finish_reason"] for frame in frames for c in frame["choices"] if c["finish_reason"]]


class Steps:
    """Has an engine take one step at a time until it is let go."""

    def __init__(self, served: Running) -> None:
        self._engine, self._step = served.engine, served.engine.step
        self._tickets, self._held, self._free = threading.Semaphore(0), threading.Event(), False
        served.engine.step = self._wait

    def _wait(self) -> list[RequestOutput]:
        self._held.set()
        if not self._free:
            self._tickets.acquire()
        return self._step()

    def one(self) -> None:
        """A step, and what it gives is on its way."""
        assert self._held.wait(20)
        self._held.clear()
        self._tickets.release()
        assert self._held.wait(20)

    def let_go(self) -> None:
        self._free = True
        self._tickets.release()
        self._engine.step = self._step


def wave(served: Running, rng: random.Random, leaves: str | None) -> tuple[list[Client], list[Client]]:
    """Requests that come together, from the first one's arrival to the last one's end: (stay, leave)."""
    steps = None if leaves is None else Steps(served)
    stay = [Client.send(served, rng, {"max_tokens": 30})]
    gone = [] if leaves is None else [Client.send(served, rng, LEAVES[leaves]) for _ in range(SIZE // 2)]
    stay += [Client.send(served, rng, ENDS[rng.choice(list(ENDS))]) for _ in range(SIZE - 1 - len(gone))]
    if steps is not None:
        try:
            refused = sum(client.body["prompt"] == [321] for client in stay)
            assert eventually(lambda: engine_requests(served) == SIZE - refused)
            if leaves != "waiting":
                steps.one()
            if leaves == "in its prompt":
                steps.one()
            while leaves == "with tokens" and not all(request.num_output_tokens for request in leaving(served)):
                steps.one()
            for client in gone:
                client.leave(served)
            calls = served.server.service.calls
            assert eventually(lambda: all(call.params.max_tokens != LEAVING for call in list(calls)))
        finally:
            steps.let_go()
    for client in stay:
        client.finish()
    assert eventually(served.idle)
    assert not served.engine.scheduler.requests
    return stay, gone


def engine_requests(served: Running) -> int:
    """How many the engine has, or has in its inbox."""
    inbox = served.server.service.engine._inbox
    return inbox.qsize() + len({name.partition("#")[0] for name in list(served.engine.scheduler.requests)})


def leaving(served: Running) -> list[Request]:
    return [r for r in list(served.engine.scheduler.requests.values()) if r.params.max_tokens == LEAVING]


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))]


@pytest.mark.parametrize("seed", SEEDS)
def test_G6_every_total_is_what_200_clients_have_counted(serve, seed):
    served = serve(max_num_seqs=32, enable_prefix_caching=False)
    rng, stay, gone = random.Random(seed), [], []
    for leaves in WAVES:
        some, others = wave(served, rng, leaves)
        stay, gone = stay + some, gone + others
    every = stay + gone
    found = served.metrics()

    def histogram(name: str) -> tuple[float, float]:
        return found[f"{name}_count"], found[f"{name}_sum"]

    answered = [client for client in stay if client.status == 200]
    tokens = [client.tokens for client in every]
    assert len(every) == 200
    assert {client.status for client in stay} == {200, 400}
    assert found["generation_tokens_total"] == sum(tokens)
    told = [client for client in every if client.tokens]
    assert found["prompt_tokens_total"] == sum(len(client.body["prompt"]) for client in told)
    outcomes = {"ok": len(answered), "abort": len(gone), "error": len(stay) - len(answered)}
    assert {name: found[f"requests_total{{outcome={name}}}"] for name in outcomes} == outcomes
    reasons = Counter(reason for client in stay for reason in client.reasons)
    reasons += Counter(abort=len(gone), error=outcomes["error"])
    assert {name: found[f"request_success_total{{finished_reason={name}}}"] for name in reasons} == reasons
    assert reasons.keys() == {"stop", "length", "abort", "error"}
    assert histogram("time_to_first_token_seconds")[0] == len(told)
    choices = sum(client.body.get("n", 1) for client in told)
    assert histogram("inter_token_latency_seconds")[0] == sum(tokens) - choices
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert histogram(f"{name}_seconds")[0] == len(answered), name
    assert histogram("request_prompt_tokens") == (len(answered), sum(len(c.body["prompt"]) for c in answered))
    generated = sum(client.tokens for client in answered)
    assert histogram("request_generation_tokens") == (sum(c.body.get("n", 1) for c in answered), generated)
    stats = served.engine.stats()
    assert histogram("iteration_tokens_total") == (stats.steps, stats.computed_tokens)
    assert found["prefix_cache_queries_total"] >= sum(len(client.body["prompt"]) for client in answered)
    statuses = Counter(client.status for client in stay)
    for status, number in statuses.items():
        assert found[f"http_requests_total{{route=/v1/completions,status={status}}}"] >= number
    assert sum(value for name, value in found.items() if name.startswith("http_requests_total")) == 200
    assert (found["num_requests_running"], found["num_requests_waiting"], found["kv_cache_usage_perc"]) == (0, 0, 0)
