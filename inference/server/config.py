"""What a person can set about the HTTP server itself; the engine's settings are `EngineConfig`'s."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

from ...configs.typed import check

MIB = 1024 * 1024
Compat = Literal["strict", "lenient"]
LogFormat = Literal["text", "json"]

_HOST = re.compile(r"\*|[0-9A-Za-z._-]+")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens and how long it waits.

    Args:
        host: the address to bind; anything but loopback requires `api_key`.
        port: the port to bind; 0 picks a free one.
        api_key: what clients send as `Authorization: Bearer <key>`; None asks for none.
        served_model_name: the model's name in requests; None takes it from the checkpoint's path.
        allowed_hosts: what `Host` may name beside the bound address (and, on loopback, `localhost`); `*` is anything.
        compat: `strict` refuses a field that nobody knows, `lenient` leaves it out and names it in `Warning`.
        max_body_bytes: a longer request body gets 413.
        max_connections: open at once, as far as the process may open files; beyond it those without a request go first.
        header_seconds: a request's head must come within this time, or its connection is closed.
        body_seconds: a request's body must come within this time, or 64 KiB of it, or it gets 408.
        idle_seconds: a connection that is kept open waits this long for its next request.
        drain_seconds: how long requests may still run after the first SIGTERM.
        keepalive_seconds: a stream that is silent for this long gets an SSE comment.
        stall_seconds: a client that reads nothing for this long loses its stream.
        stream_buffer_bytes: what a client has not taken yet, here and in the kernel each; a stream waits for more room.
        log_format: of the lines that are written, one a request among them: `text` or `json`.
        otlp_endpoint: the collector that gets a trace of each request, by OTLP over HTTP; None sends nothing.

    Raises:
        ConfigError: a value out of range, or a public address without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    compat: Compat = "strict"
    max_body_bytes: int = 4 * MIB
    max_connections: int = 16384
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    drain_seconds: float = 30.0
    keepalive_seconds: float = 15.0
    stall_seconds: float = 30.0
    stream_buffer_bytes: int = 64 * 1024
    log_format: LogFormat = "text"
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        check(0 <= self.port <= 65535, "port", self.port, "must lie in 0..65535", "use 0 for any free port")
        check(self.api_key != "", "api_key", "''", "must not be empty", "give a long random key or leave it out")
        check(
            self.api_key is not None or _is_loopback(self.host),
            "host",
            self.host,
            "is reachable from other machines and there is no api_key",
            "set api_key=... or use host=127.0.0.1",
        )
        check(self.max_body_bytes >= 1, "max_body_bytes", self.max_body_bytes, "must be positive", f"use {4 * MIB}")
        for name in self.allowed_hosts:
            rule = "must be a name or an address without a port, or *"
            check(
                _HOST.fullmatch(name) is not None,
                "allowed_hosts",
                name,
                rule,
                "write allowed_hosts=model.example,other",
            )
        for name in ("max_connections", "stream_buffer_bytes"):
            value = getattr(self, name)
            check(value >= 1, name, value, "must be positive", "leave it out")
        for name in ("drain_seconds", "keepalive_seconds", "stall_seconds"):
            value = getattr(self, name)
            check(0 <= value < float("inf"), name, value, "must be a finite time in seconds", "use 30")
        for name in ("header_seconds", "body_seconds", "idle_seconds"):
            value = getattr(self, name)
            check(0 < value < float("inf"), name, value, "must be a positive time in seconds", "use 30")
        if self.otlp_endpoint is not None:
            url = urlsplit(self.otlp_endpoint)
            fix = "use http://127.0.0.1:4318"
            known = url.scheme in ("http", "https") and bool(url.hostname)
            check(known, "otlp_endpoint", self.otlp_endpoint, "must be a collector's http or https URL", fix)
        check(self.compat in get_args(Compat), "compat", self.compat, "must be strict or lenient", "use strict")
        check(self.log_format in get_args(LogFormat), "log_format", self.log_format, "must be text or json", "use text")


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback if _is_address(host) else host == "localhost"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
