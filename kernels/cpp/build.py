"""Compiles the C++ kernels once a machine and loads them.

The library's name is the hash of the sources, the flags and the compiler, so a change of any builds another. Several
processes may come at once: one compiles under a file lock, into a folder of its own whose library is renamed when it is
whole. Every `.cpp` file is compiled by itself, as many at once as there are processors.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOG = logging.getLogger(__name__)
SOURCES = Path(__file__).parent
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fopenmp", "-Wno-psabi", "-Wno-ignored-attributes",
)  # fmt: skip
# what the CPU must have → what is compiled for it, best first
INSTRUCTIONS: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "fma", "f16c"},
     ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni", "-mfma", "-mf16c")),
    ({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"},
     ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")),
    ({"avx2", "fma", "f16c"}, ("-mavx2", "-mfma", "-mf16c")),
    (set(), ()),
)  # fmt: skip
SECONDS = 600


class UnbuiltError(Exception):
    """Why there are no kernels; caught here."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None, after one warning, where they can not be had."""
    try:
        return load(instructions(_cpu()))
    except (UnbuiltError, OSError) as error:
        LOG.warning("no C++ kernels (%s): batch-invariant operations run row by row, which is slow", error)
        return None


def load(flags: tuple[str, ...]) -> ctypes.CDLL:
    """The kernels for these instructions, compiled unless they are there.

    Raises:
        UnbuiltError: there is no compiler, or it fails. OSError: nowhere to write to.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise UnbuiltError(f"they are written for x86-64, this is {platform.machine()}")
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    return load_units([path for path in sources if path.suffix == ".cpp"], (*FLAGS, *flags), (), sources)


def load_units(
    units: Sequence[Path], flags: tuple[str, ...], last: tuple[str, ...], sources: Sequence[Path]
) -> ctypes.CDLL:
    """A library of these units, compiled unless it is there.

    Args:
        last: what the linker wants behind the objects.
        sources: what it is made of.

    Raises:
        UnbuiltError, OSError: as `load`.
    """
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise UnbuiltError(f"no compiler: install one of {', '.join(COMPILERS)}")
    command = (compiler, *flags)
    version = subprocess.run((compiler, "--version"), capture_output=True, text=True, check=False).stdout  # noqa: S603
    made_of = [path.read_text(encoding="utf-8") for path in sources]
    key = repr((command, [unit.name for unit in units], last, version, made_of))
    folder = _folder()
    built = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile(command, units, last, built)
    return ctypes.CDLL(str(built))


def instructions(has: set[str]) -> tuple[str, ...]:
    """The flags for a CPU that has these."""
    return next(flags for needed, flags in INSTRUCTIONS if needed <= has)


def _compile(command: tuple[str, ...], units: Sequence[Path], last: tuple[str, ...], built: Path) -> None:
    LOG.info("compiling C++ (%s), once on this machine", command[0])
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        objects = [Path(folder) / f"{unit.stem}.o" for unit in units]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            calls = [(*command, "-c", str(unit), "-o", str(it)) for unit, it in zip(units, objects, strict=True)]
            list(pool.map(_run, calls))
        whole = Path(folder) / built.name
        _run((*command, "-shared", *map(str, objects), *last, "-o", str(whole)))
        whole.replace(built)


def _run(call: tuple[str, ...]) -> None:
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise UnbuiltError(f"{call[0]} took more than {SECONDS} s") from error
    if done.returncode:
        raise UnbuiltError(f"{call[0]} failed: {done.stderr.strip()[:400]}")


def _cpu() -> set[str]:
    """What this CPU has, in Linux's words."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


@functools.cache
def _folder() -> Path:
    """The user's cache; a folder of this process only where there is none. Nobody else can write to either."""
    try:
        folder = Path.home() / ".cache" / "turnout" / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if os.access(folder, os.W_OK) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    except (OSError, RuntimeError):
        LOG.debug("no cache in the home directory", exc_info=True)
    return Path(tempfile.mkdtemp(prefix="turnout-kernels-"))
