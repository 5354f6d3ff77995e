"""`turnout serve` as a child process on a free port: started, waited for, stopped cleanly."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import PeerError


@contextmanager
def serving(model: Path, folder: Path, *, start_timeout: float = 120.0, stop_timeout: float = 60.0) -> Iterator[str]:
    """Run the server on `model` for the length of the block and give its address (`http://127.0.0.1:PORT`).

    Args:
        model: a run or model directory.
        folder: takes the server's output (`serve.log`) and its word that it is ready (`serve.json`).
        start_timeout: until it must be ready (s).
        stop_timeout: until it must be gone after SIGTERM (s).

    Raises:
        PeerError: it did not start, died, or did not stop with exit code 0.
    """
    log, ready = folder / "serve.log", folder / "serve.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "turnout", "serve", str(model), "port=0", f"json={ready}"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603 (our own program)
        try:
            yield _address(process, ready, log, start_timeout)
        finally:
            process.terminate()
            try:
                process.wait(stop_timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise PeerError(f"the server ended with exit code {process.returncode}, not 0: see {log}\n{_tail(log)}")


def _address(process: subprocess.Popen[bytes], ready: Path, log: Path, timeout: float) -> str:
    """Wait until the server has written where it listens."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerError(f"the server stopped with exit code {process.returncode}: see {log}\n{_tail(log)}")
        try:
            return str(json.loads(ready.read_text(encoding="utf-8"))["url"])
        except (FileNotFoundError, json.JSONDecodeError):  # not there, or not written to its end
            time.sleep(0.05)
    raise PeerError(f"the server was not ready after {timeout:g} s: see {log}\n{_tail(log)}")


def _tail(log: Path, lines: int = 10) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
