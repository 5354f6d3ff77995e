"""A real HTTP server that answers what a test has written, byte for byte, and when a test's clock says so."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def frame(text: str = "", **fields: Any) -> bytes:
    """A piece of a completion, as most servers spell it."""
    told = {"choices": [{"index": 0, "text": text, "finish_reason": None}] if text else [], "usage": None} | fields
    return b"data: " + json.dumps(told, separators=(",", ":")).encode() + b"\n\n"


def usage(tokens: int, prompt: int = 3) -> bytes:
    return frame(usage={"completion_tokens": tokens, "prompt_tokens": prompt})


def plain(status: int, body: bytes, *headers: str) -> bytes:
    """A whole answer with its length."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class Clock:
    """Seconds that pass when a server says so."""

    def __init__(self) -> None:
        self.now, self.reads = 0.0, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now

    def pass_and_wait(self, seconds: float, send: Callable[[], object]) -> None:
        """Let time pass, send something, and go on when somebody has looked at the clock since."""
        self.now += seconds
        reads, deadline = self.reads, time.monotonic() + 20
        send()
        while self.reads == reads and time.monotonic() < deadline:
            time.sleep(0.0002)


Play = Callable[[dict[str, Any], Callable[[bytes], object]], object]


@contextlib.contextmanager
def scripted(play: Play) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose `play(asked, send)` answers each request; its address, and what was asked: path, headers, body."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({"path": self.path, "headers": dict(self.headers), "body": None})
            self.wfile.write(plain(200, b'{"data": [{"id": "scripted"}]}'))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "headers": dict(self.headers), "body": asked})
            play(asked, self.wfile.write)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(20)
