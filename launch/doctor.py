"""`turnout doctor`: is this machine fit, what will run here and how fast; and what to do about what is missing."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .cli import Options, parse, write_json

SUMMARY = "is this machine fit, and what will run here"
HELP = """\
Look at this machine: processor, memory, compiler, libraries, the forms of every operation, two processes that exchange.

usage: turnout doctor [key=value ...]

  quick=false   true: measure nothing (memory read, matrix products)
  json=PATH     write what was found there

Exit code: 0 fit (warnings say what could be faster), 2 not fit.

example: turnout doctor
"""
UNFIT = 2
INSTRUCTIONS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
GIB = 1 << 30
LIBRARIES = {  # name → needed, and what for
    "torch": (True, "everything: pip install 'torch>=2.11'"),
    "triton": (False, "the kernels of GPUs: pip install 'triton>=3.6'"),
    "deepspeed": (False, "engine=deepspeed: pip install 'turnout[deepspeed]'"),
    "gguf": (False, "models in GGUF files: pip install 'turnout[gguf]'"),
    "ray": (False, "several replicas of a server: pip install 'turnout[ray]'"),
}
Verdict = Literal["ok", "slow", "unfit"]


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """What `turnout doctor` takes; see HELP."""

    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: was looked at.
        found: in words.
        verdict: ok; slow: something works, but not as well as it could; unfit: something does not work.
        fix: what to do about it.
    """

    what: str
    found: str
    verdict: Verdict = "ok"
    fix: str = ""

    def __str__(self) -> str:
        mark = {"ok": "  ", "slow": "! ", "unfit": "X "}[self.verdict]
        return f"{mark}{self.what:<15}{self.found}" + (f"\n{'':<17}-> {self.fix}" if self.fix else "")


def main(args: list[str]) -> int:
    """The verb; 0 when the machine is fit, else 2."""
    _, options = parse(DoctorOptions, args, words=())
    found: list[Finding] = []
    forms: dict[str, Any] = {}
    for finding in (*system(), *libraries()):
        found.append(finding)
        print(finding, flush=True)
    if importlib.util.find_spec("torch") is not None:
        for finding in computing(options.quick):
            found.append(finding)
            print(finding, flush=True)
        forms = operations()
        print("\n".join(lines(forms)), flush=True)
    unfit = [finding.what for finding in found if finding.verdict == "unfit"]
    write_json(options.json, {"fit": not unfit, "findings": [asdict(f) for f in found], "operations": forms})
    print(f"not fit: {', '.join(unfit)}" if unfit else "fit", flush=True)
    return UNFIT if unfit else 0


def system() -> Iterator[Finding]:
    """Processor, memory, pages, files: what the operating system says."""
    yield processor(_text("/proc/cpuinfo"), len(os.sched_getaffinity(0)))
    yield memory(_text("/proc/meminfo"))
    yield huge_pages(_text("/sys/kernel/mm/transparent_hugepage/enabled"))
    yield shared_memory(Path("/dev/shm"))  # noqa: S108 (where others share memory, too)
    yield files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def processor(cpuinfo: str, cores: int) -> Finding:
    """Name, cores and the instructions that kernels ask for, from /proc/cpuinfo."""
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines()[::-1] if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    has = [name for name in INSTRUCTIONS if name in known.get("flags", "").split()]
    found = f"{known.get('model name', platform.machine())}, {cores} cores, {' '.join(has) or 'no vector instructions'}"
    if "avx2" not in has:
        return Finding(what="processor", found=found, verdict="slow", fix="a CPU with AVX2, better AVX-512 BF16")
    return Finding(what="processor", found=found)


def memory(meminfo: str) -> Finding:
    """How much there is and how much is free, from /proc/meminfo."""
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in meminfo.splitlines() if " kB" in line}
    free = sizes.get("MemAvailable", 0)
    found = f"{free / GIB:.1f} of {sizes.get('MemTotal', 0) / GIB:.1f} GiB free"
    if free < 2 * GIB:
        return Finding(what="memory", found=found, verdict="slow", fix="end other programs: small models need 2 GiB")
    return Finding(what="memory", found=found)


def huge_pages(enabled: str) -> Finding:
    """The mode of transparent huge pages: `always [madvise] never`."""
    mode = enabled.partition("[")[2].partition("]")[0] or "unknown"
    if mode in ("always", "madvise"):
        return Finding(what="huge pages", found=mode)
    fix = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root): weights are read faster"
    return Finding(what="huge pages", found=mode, verdict="slow", fix=fix)


def shared_memory(folder: Path) -> Finding:
    """Room for what processes share."""
    fix = "mount a tmpfs of 1 GiB there (docker: --shm-size=1g): deepspeed needs it"
    if not folder.is_dir():
        return Finding(what="shared memory", found=f"no {folder}", verdict="slow", fix=fix)
    free = shutil.disk_usage(folder).free
    if free < 64 << 20:
        return Finding(what="shared memory", found=f"{free >> 20} MiB free in {folder}", verdict="slow", fix=fix)
    return Finding(what="shared memory", found=f"{free / GIB:.1f} GiB free in {folder}")


def files(limit: int) -> Finding:
    """How many files and connections a process may have open."""
    found = f"{'any number' if limit == resource.RLIM_INFINITY else limit} may be open"
    if limit != resource.RLIM_INFINITY and limit < 1024:
        return Finding(what="files", found=found, verdict="slow", fix="ulimit -n 65536: a server needs one a client")
    return Finding(what="files", found=found)


def libraries() -> Iterator[Finding]:
    """Versions of what is installed."""
    yield Finding(what="python", found=platform.python_version())
    for name, (needed, purpose) in LIBRARIES.items():
        try:
            yield Finding(what=name, found=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if needed:
                yield Finding(what=name, found="not installed", verdict="unfit", fix=f"needed for {purpose}")
            else:
                yield Finding(what=name, found=f"not installed (only for {purpose})")


def computing(quick: bool) -> Iterator[Finding]:
    """Devices, our compiled kernels, two processes, and unless `quick` how fast the machine is."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding(what="devices", found=f"{', '.join(names) or 'no GPU'}; {torch.get_num_threads()} CPU threads")
    yield compiler()
    yield compiled()
    yield processes()
    if not quick:
        from .benches import ceilings

        yield Finding(what="speed", found=str(ceilings.measure(ceilings.device())))


def compiler() -> Finding:
    """The one that the kernels are compiled with."""
    from ..kernels.cpp.build import COMPILERS

    path = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if path is None:
        fix = f"install one of {', '.join(COMPILERS)} (Debian: apt install g++)"
        return Finding(what="compiler", found="none", verdict="slow", fix=fix)
    said = subprocess.run((path, "--version"), capture_output=True, text=True, check=False).stdout  # noqa: S603
    return Finding(what="compiler", found=said.partition("\n")[0] or path)


def compiled() -> Finding:
    """The C++ kernels: for which instructions, and how long it took to have them."""
    from ..kernels.cpp import build

    start = time.perf_counter()
    try:
        flags = build.instructions(build._cpu())
        build.load(flags)
    except (build.UnbuiltError, OSError) as error:
        fix = "without them PyTorch's forms run: mend that, then run turnout doctor again"
        return Finding(what="C++ kernels", found=f"none ({error})", verdict="slow", fix=fix)
    seconds = time.perf_counter() - start
    built = f"for {' '.join(flag.removeprefix('-m') for flag in flags) or 'any x86-64'}"
    return Finding(what="C++ kernels", found=f"{built}; there in {seconds:.2f} s (compiled once, then kept)")


def processes() -> Finding:
    """Whether two processes of this machine can exchange numbers."""
    from . import ranks

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "exchange.json"
        code = ranks.run(f"{__package__}.benches.exchange", [str(result)], world=2, timeout=60.0)
        if code == 0 and result.exists():
            found = json.loads(result.read_text(encoding="utf-8"))
            return Finding(what="2 processes", found=f"exchange 1 MiB over gloo in {found['ms']:.2f} ms")
    fix = "see the lines above: connections to 127.0.0.1 must be allowed and a hostname must resolve"
    return Finding(what="2 processes", found=f"can not exchange (exit code {code})", verdict="unfit", fix=fix)


def operations() -> dict[str, dict[str, Any]]:
    """Operation → the forms that run here, and which one runs unasked for few rows and for many."""
    import torch

    from ..kernels import registry
    from .benches.cases import cases
    from .benches.ceilings import device
    from .benches.maker import Maker

    found: dict[str, dict[str, Any]] = {}
    maker = Maker(device(), cold=0)
    with torch.inference_mode():
        for op, forms in registry.FORMS.items():
            tried = {case.shape: (case.make()[0], case.keywords) for case in _ends(cases(op, maker))}
            unasked = {shape: registry.choose(op, *args, **rest) for shape, (args, rest) in tried.items()}
            runs = []
            for form in forms:
                with registry.using(form):
                    if any(registry.choose(op, *args, **rest) == form for args, rest in tried.values()):
                        runs.append(form)
            found[op] = {"forms": list(forms), "run": runs, "unasked": unasked}
    return found


def lines(operations: dict[str, dict[str, Any]]) -> list[str]:
    """The operations for a person."""
    shown = ["", f"  {'operation':<18}{'forms that run here':<32}unasked"]
    for op, found in operations.items():
        unasked = found["unasked"]
        alike = len(set(unasked.values())) <= 1
        chosen = "".join(set(unasked.values())) if alike else "; ".join(f"{f} at {at}" for at, f in unasked.items())
        shown.append(f"  {op:<18}{' '.join(found['run']):<32}{chosen}")
    return shown


def _ends(cases: list[Any]) -> list[Any]:
    """The first and the last."""
    return [*cases[:1], *cases[1:][-1:]]


def _text(path: str) -> str:
    """What a file says; nothing where it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
