"""Compile every production kernel for sm_90 on a machine without a GPU and hold its resources: shared memory, spills
and tensor-core instructions.

    python -m turnout.kernels.compile_check [the beginning of a case's name ...]
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import ConfigError
from .compile_cases import Case, cases

SHARED_LIMIT = 227 * 1024  # bytes a block may use on sm_90
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiled kernel takes: bytes of shared memory and stack, registers a thread, instruction counts."""

    name: str
    shared: int
    registers: int
    stack: int
    spills: int
    hgmma: int
    failures: tuple[str, ...]

    def __str__(self) -> str:
        verdict = "; ".join(self.failures) or "ok"
        return (
            f"{self.name:44s} shared {self.shared // 1024:3d} KB  registers {self.registers:3d}  stack {self.stack:4d} "
            f"spills {self.spills:3d}  HGMMA {self.hgmma:3d}  {verdict}"
        )


def check(case: Case) -> Report:
    """Compile one case; `failures` names the rules it breaks."""
    aligned = {(i,): _ALIGNED for i, kind in enumerate(case.signature.values()) if kind == "i32" or kind[0] == "*"}
    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        assembly, usage = _cuobjdump("-sass", path), _cuobjdump("-res-usage", path)
    shared = compiled.metadata.shared
    registers, stack = (int(re.findall(rf"{field}:(\d+)", usage)[0]) for field in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    hgmma = len(re.findall(r"\bHGMMA\b", assembly))
    failures = []
    if shared > SHARED_LIMIT:
        failures.append(
            f"shared memory ({shared}) must be at most {SHARED_LIMIT} bytes: fewer stages or a smaller tile"
        )
    if stack or spills:
        failures.append(f"registers spill ({stack} bytes of stack, {spills} accesses): a smaller tile or more warps")
    if case.hgmma and not hgmma:
        failures.append("HGMMA (0) must be present: the tile has fewer rows than its warps cover")
    return Report(
        name=case.name,
        shared=shared,
        registers=registers,
        stack=stack,
        spills=spills,
        hgmma=hgmma,
        failures=tuple(failures),
    )


def _cuobjdump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout + done.stderr


def main(names: tuple[str, ...] = ("",)) -> int:
    """Check the cases whose names begin so; 1 if one fails."""
    if triton.knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET (1) must be unset: interpreted kernels can not be compiled")
    reports = [check(case) for case in cases() if case.name.startswith(names)]
    sys.stdout.write("".join(f"{report}\n" for report in reports))
    return int(any(report.failures for report in reports))


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or ("",)))
