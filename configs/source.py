"""Which code this is: a digest of the package's own files."""

import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
OWN = ("launch", "inference", "moe", "parallel", "kernels", "configs")


@functools.cache
def source_digest(package: Path = PACKAGE) -> str:
    """sha256 over the names and bytes of every source file that the package runs, 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for path in sorted([*package.glob("*.py"), *(path for part in OWN for path in (package / part).rglob("*.py"))]):
        sha.update(f"{path.relative_to(package).as_posix()} {path.stat().st_size}\n".encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()
