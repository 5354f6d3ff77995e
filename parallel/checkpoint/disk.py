"""The few disk operations of a save, behind one small object, so that a test can make each of them fail."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from ... import CheckpointError

CHUNK = 1 << 22


class Disk:
    """Durable writes. Every failure is a `CheckpointError` that names the path and, in a write, the bytes: needed,
    written and free."""

    def open(self, path: Path) -> IO[bytes]:
        """A new file for writing; an existing one is never opened."""
        return path.open("xb")

    def fsync(self, descriptor: int) -> None:
        """Force a file or directory to the disk."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move atomically within one file system."""
        source.rename(target)

    def write(self, path: Path, parts: Iterable[bytes | memoryview], needed: int) -> tuple[int, str]:
        """Write `parts`, `needed` bytes in all, durably; returns (bytes, sha256 of what was meant to be written)."""
        sha, written = hashlib.sha256(), 0
        try:
            with self.open(path) as out:
                for part in parts:
                    out.write(part)
                    sha.update(part)
                    written += len(part)
                out.flush()
                self.fsync(out.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{path} ({needed} bytes needed, {written} written, {_free(path)} free) can not be saved ({error}): "
                "free space or choose another place"
            ) from error
        return written, sha.hexdigest()

    def make_directory(self, path: Path) -> None:
        """Create a directory that must not exist yet, with its parents."""
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{path} can not be created ({error}): choose another place") from error

    def publish(self, source: Path, target: Path) -> None:
        """Give a complete directory its final name, durably: first its entries, then the rename, then the parent's."""
        try:
            self._sync_directory(source)
            self.rename(source, target)
            self._sync_directory(target.parent)
        except OSError as error:
            raise CheckpointError(f"{source} can not become {target} ({error}): see the file system's log") from error

    def remove(self, path: Path, aside: Path) -> None:
        """Delete a directory that other readers know: it first takes the name `aside`, so it is whole or gone."""
        try:
            self.rename(path, aside)
            shutil.rmtree(aside)
        except OSError as error:
            raise CheckpointError(f"{path} can not be removed ({error}): remove it by hand") from error

    def _sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self.fsync(descriptor)
        finally:
            os.close(descriptor)


def _free(path: Path) -> str:
    """Bytes that are left where `path` was to be; the disk may be past answering."""
    try:
        return str(shutil.disk_usage(path.parent).free)
    except OSError:
        return "unknown"


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
