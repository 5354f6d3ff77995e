"""A disk that fails, or kills its process, at the n-th operation; and one that waits to be let on."""

import errno
import os
import signal
import threading
from pathlib import Path
from typing import IO

from turnout.parallel.checkpoint.disk import Disk


class FlakyDisk(Disk):
    """Counts open, write, fsync and rename; the operation number `at` (from 0) does not happen.

    `how` is an errno, raised as OSError after half of a write's bytes went out, or "kill": SIGKILL to this process.
    """

    def __init__(self, at: int, how: int | str = errno.ENOSPC) -> None:
        self.at, self.how, self.count, self.names = at, how, 0, []

    def strike(self, name: str) -> None:
        self.names.append(name)
        self.count += 1
        if self.count - 1 == self.at:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.how, os.strerror(self.how))

    def open(self, path: Path) -> IO[bytes]:
        self.strike("open")
        return FlakyFile(super().open(path), self)

    def fsync(self, descriptor: int) -> None:
        self.strike("fsync")
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self.strike("rename")
        super().rename(source, target)


class FlakyFile:
    def __init__(self, file: IO[bytes], disk: FlakyDisk) -> None:
        self.file, self.disk = file, disk
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.disk.strike("write")
        self.file.write(data[len(data) // 2 :])


class GatedDisk(Disk):
    """Opens no file before `gate` is set, or `seconds` have passed; counts the writers that wait at once."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.gate, self.seconds, self.waiting, self.most = threading.Event(), seconds, 0, 0

    def open(self, path: Path) -> IO[bytes]:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        self.gate.wait(self.seconds)
        self.waiting -= 1
        return super().open(path)
