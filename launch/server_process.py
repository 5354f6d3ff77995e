"""`turnout serve` as a child process on a free port: started, waited for, stopped cleanly."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import PeerError


@contextmanager
def serving(model: Path, log: Path, *, start_timeout: float = 120.0, stop_timeout: float = 30.0) -> Iterator[str]:
    """Run the server on `model` for the length of the block and give its address (`http://127.0.0.1:PORT`).

    Args:
        model: a run or model directory.
        log: takes the server's output.
        start_timeout: until it must be healthy (s).
        stop_timeout: until it must be gone after SIGTERM (s).

    Raises:
        PeerError: it did not start, died, or did not stop with exit code 0.
    """
    port = free_port()
    command = [sys.executable, "-m", "turnout", "serve", str(model), f"port={port}"]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603 (our own program)
        try:
            _wait_until_healthy(process, address, log, start_timeout)
            yield address
        finally:
            process.terminate()
            try:
                code = process.wait(stop_timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    if code != 0:
        raise PeerError(f"the server ended with exit code {code}, not 0: see {log}\n{_tail(log)}")


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerError(f"the server stopped with exit code {process.returncode}: see {log}\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:  # noqa: S310 (our own address)
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise PeerError(f"the server was not healthy after {timeout:g} s: see {log}\n{_tail(log)}")


def _tail(log: Path, lines: int = 10) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
