"""What a person can set about the HTTP server itself; the engine's settings are `EngineConfig`'s."""

import ipaddress
from dataclasses import dataclass

from ...configs.typed import check

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens and how long it waits.

    Args:
        host: the address to bind; anything but loopback requires `api_key`.
        port: the port to bind; 0 picks a free one.
        api_key: what clients send as `Authorization: Bearer <key>`; None asks for none.
        served_model_name: the model's name in requests; None takes it from the checkpoint's path.
        max_body_bytes: a longer request body gets 413.
        drain_seconds: how long requests may still run after the first SIGTERM.
        keepalive_seconds: a stream that is silent for this long gets an SSE comment.
        stall_seconds: a client that reads nothing for this long loses its stream.

    Raises:
        ConfigError: a value out of range, or a public address without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    max_body_bytes: int = 4 * MIB
    drain_seconds: float = 30.0
    keepalive_seconds: float = 15.0
    stall_seconds: float = 30.0

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
        for name in ("drain_seconds", "keepalive_seconds", "stall_seconds"):
            value = getattr(self, name)
            check(0 <= value < float("inf"), name, value, "must be a finite time in seconds", "use 30")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
