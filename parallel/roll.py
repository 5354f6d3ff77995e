"""Who still answers: every rank's heart beats in the rendezvous' store, and whoever loses a peer looks who fell silent.

    roll.start(name, timeout)    # once the process group of that name (`meeting`) stands
    roll.silent()                # after a failure, on one rank alone: the ranks that do not answer
    roll.stop()

The heart is a thread of its own: a rank that computes or waits for a peer beats on, one that is dead, stopped or on a
machine that is gone does not.
"""

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

BEAT = 0.5  # seconds
SILENCE = 4 * BEAT  # without a beat, after which a rank is said not to answer
ANSWER = timedelta(seconds=5)  # that the store has


@dataclass(frozen=True)
class Silent:
    """A rank that does not answer; `host` and `pid` are where it lived, None when it never beat."""

    rank: int
    host: str | None
    pid: int | None

    def __str__(self) -> str:
        return f"rank {self.rank}" + ("" if self.host is None else f" (process {self.pid} on {self.host})")


class Roll:
    """The hearts of all ranks; see the module."""

    def __init__(self) -> None:
        self._store: dist.Store | None = None
        self._world = 0
        self._stopped = threading.Event()

    def start(self, name: str, timeout: timedelta) -> None:
        """Begin to beat under `name`, in the store that torchrun's environment says; it has `timeout` to be found."""
        env = os.environ
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timeout, wait_for_workers=False)
        store.set_timeout(ANSWER)
        self._store, self._world = dist.PrefixStore(f"{name}/hearts", store), dist.get_world_size()
        self._stopped = threading.Event()
        arguments = (self._store, dist.get_rank(), self._stopped)
        threading.Thread(target=_beat, args=arguments, name="heart", daemon=True).start()

    def stop(self) -> None:
        """Stop beating."""
        self._stopped.set()
        self._store = None

    def silent(self) -> list[Silent] | None:
        """The ranks that do not beat while we watch for `SILENCE` seconds; None when that can not be known."""
        found: list[list[Silent]] = []
        watcher = threading.Thread(target=self._watch, args=(found,), daemon=True)  # a store may never answer
        watcher.start()
        watcher.join(SILENCE + ANSWER.total_seconds())
        return found[0] if found else None

    def _watch(self, found: list[list[Silent]]) -> None:
        try:
            before = self._beats()
            time.sleep(SILENCE)
            after = self._beats()
        except RuntimeError:  # the store is gone, or there never was one
            return
        quiet = [rank for rank in range(self._world) if before[rank] is None or before[rank] == after[rank]]
        last = {rank: json.loads(beat) for rank in quiet if (beat := after[rank]) is not None}
        found.append([Silent(rank, *last[rank][:2]) if rank in last else Silent(rank, None, None) for rank in quiet])

    def _beats(self) -> list[bytes | None]:
        store = self._store
        if store is None:
            raise RuntimeError("the roll has stopped")
        keys = [str(rank) for rank in range(self._world)]
        return [store.get(key) if store.check([key]) else None for key in keys]


def _beat(store: dist.Store, rank: int, stopped: threading.Event) -> None:
    count = 0
    while not stopped.wait(BEAT if count else 0.0):
        count += 1
        try:
            store.set(str(rank), json.dumps([socket.gethostname(), os.getpid(), count]))
        except RuntimeError:
            return  # the store is gone, and the run with it
