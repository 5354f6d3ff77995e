"""Servers as child processes: ours and those of others, started, waited for, put to sleep, measured, stopped.

Other engines live in environments of their own below one folder:

    venvs/vllm                    with the command `vllm`
    src/*/vendor/llama.cpp/build  with the program `bin/llama-server`
    models/NAME.bf16.gguf         the model for it

A server that others take turns with sleeps meanwhile (SIGSTOP), so that its idle threads cost them nothing.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import PeerError
from .online import Ask, Target, models, run

START = 300.0  # seconds
STOP = 30.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """How a server is started.

    Args:
        name: of its rows.
        words: the program and its arguments.
        environment: what it needs beside ours.
    """

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that answers. Signals reach all of its processes, which are a session of their own."""

    name: str
    url: str
    pid: int
    ready_seconds: float

    def sleep(self) -> None:
        """Stop all its threads until `wake`."""
        os.killpg(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        os.killpg(self.pid, signal.SIGCONT)

    @property
    def peak_mb(self) -> float:
        """The most memory that its processes have held, each at its own peak, in MB (VmHWM)."""
        return sum(peak_bytes(pid) for pid in (self.pid, *_below(self.pid))) / 1e6


def ours(path: str, port: int, settings: Sequence[str]) -> Command:
    """`turnout serve` on a model."""
    words = (sys.executable, "-m", "turnout", "serve", path, f"port={port}", *settings)
    return Command(name="turnout", words=words, environment={})


def vllm(folder: Path, path: str, port: int, seats: int) -> Command | None:
    """vLLM's server; None where it is not installed."""
    program = folder / "venvs" / "vllm" / "bin" / "vllm"
    if not program.exists():
        return None
    words = (
        str(program), "serve", path, "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "1024",
        "--max-num-seqs", str(seats), "--max-num-batched-tokens", "2048", "--no-enable-prefix-caching",
        "--served-model-name", "model",
    )  # fmt: skip
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return Command(name="vllm", words=words, environment=own)


def llama(folder: Path, path: str, port: int) -> Command | None:
    """llama.cpp's server, sixteen seats; None where it, or the model as GGUF, is not there."""
    programs = sorted(folder.glob("src/*/vendor/llama.cpp/build/bin/llama-server"))
    model = folder / "models" / f"{Path(path).name}.bf16.gguf"
    if not programs or not model.exists():
        return None
    threads = str(os.cpu_count() or 1)
    words = (
        str(programs[0]), "-m", str(model), "-np", "16", "-c", str(16 * 640), "-t", threads, "-tb", threads,
        "--host", "127.0.0.1", "--port", str(port), "-b", "2048", "-ub", "512", "--no-webui",
    )  # fmt: skip
    return Command(name="llama.cpp", words=words, environment={})


@contextlib.contextmanager
def started(command: Command, port: int, log: Path) -> Iterator[Running]:
    """The server, for the length of the block.

    Raises:
        PeerError: it did not come up.
    """
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(  # noqa: S603 (programs that the user has installed)
            command.words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **command.environment},
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log, command.name)
            yield Running(
                name=command.name, url=url, pid=process.pid, ready_seconds=time.perf_counter() - start
            )  # fmt: skip
        finally:
            _stop(process)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """SIGTERM unwinds the block, so that what it has started ends too."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def peak_bytes(pid: int) -> int:
    """VmHWM of a process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            for child in map(int, listed.read_text(encoding="utf-8").split()):
                found += [child, *_below(child)]
    return found


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, name: str) -> None:
    """Until it has given a token: some answer before they can."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if run(Target(url=url, model=models(url)[0]), [Ask(prompt=(1, 2, 3), tokens=1)])[0].ok:
                return
        except PeerError:
            time.sleep(0.05)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
    raise PeerError(f"{name} did not start: see {log}\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End all processes of the session, asleep or not."""
    for sign, seconds in ((signal.SIGTERM, STOP), (signal.SIGKILL, STOP)):
        try:
            os.killpg(process.pid, sign)
            os.killpg(process.pid, signal.SIGCONT)
            process.wait(seconds)
        except ProcessLookupError:
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue
