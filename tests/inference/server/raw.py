"""Bytes to a server and back, with nothing in between that would mend them."""

import json
import re
import socket
from dataclasses import dataclass
from typing import Any

from .conftest import NAME

HOST = b"Host: localhost"
JSON = b"Content-Type: application/json"
GOOD = json.dumps({"model": NAME, "prompt": "The list", "max_tokens": 1}).encode()


def head(line: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join((line, *headers, b"", b""))


def get(path: bytes = b"/health", *headers: bytes, version: bytes = b"1.1", method: bytes = b"GET") -> bytes:
    return head(b"%b %b HTTP/%b" % (method, path, version), HOST, *headers)


def post(*headers: bytes, body: bytes = GOOD, path: bytes = b"/v1/completions", version: bytes = b"1.1") -> bytes:
    """A completion whose headers say nothing of the body's length but what is given."""
    return head(b"POST %b HTTP/%b" % (path, version), HOST, JSON, *headers) + body


def sized(body: bytes = GOOD) -> bytes:
    return b"Content-Length: %d" % len(body)


def chunks(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


def connect(url: str, timeout: float = 30.0) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


@dataclass
class RawAnswer:
    """What came back: of a stream the frames are not taken apart."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Of an answer that is an error in OpenAI's shape, small and discreet."""
        assert self.headers["content-type"] == "application/json"
        assert len(self.body) <= 4096
        assert b"Traceback" not in self.body
        assert b"/work" not in self.body
        (error,) = json.loads(self.body).values()
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return error


def read_answer(client: socket.socket, ahead: bytearray, *, empty: bool = False) -> RawAnswer | None:
    """The next answer, or None at the end; `ahead` keeps what is behind it, `empty` is an answer to HEAD."""
    while b"\r\n\r\n" not in ahead:
        data = client.recv(65536)
        if not data:
            assert not ahead, bytes(ahead)
            return None
        ahead += data
    top, _, rest = bytes(ahead).partition(b"\r\n\r\n")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert len(headers) == len(lines), lines
    status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z -]*", first)[1])
    size = 0 if empty or status == 100 else int(headers["content-length"])
    while len(rest) < size:
        data = client.recv(65536)
        assert data, rest
        rest += data
    ahead[:] = rest[size:]
    return RawAnswer(status, headers, rest[:size])


def converse(url: str, data: bytes, answers: int, *, half_close: bool = False) -> tuple[list[RawAnswer], bool]:
    """Send bytes, read that many answers; they, and whether the server then closes instead of waiting for more."""
    ahead = bytearray()
    with connect(url) as client:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        found = [read_answer(client, ahead, empty=data.startswith(b"HEAD")) for _ in range(answers)]
        assert None not in found, "the server closed without an answer"
        closes = "close" in (found[-1].headers.get("connection", "") if found else "close")
        if closes:
            assert read_answer(client, ahead) is None
        return found, closes
