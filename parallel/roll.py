"""Who still answers: every rank's heart beats in the rendezvous' store, and whoever loses a peer looks who fell silent.

    roll.start(name, timeout)    # once the process group of that name (`meeting`) stands
    roll.silent()                # after a failure, on one rank alone: the ranks that do not answer
    roll.watch(lost)             # where nobody may wait for a time-out: `lost` is called as soon as one is missed
    roll.say("out of memory")    # the last words of a rank that ends, for those who miss it
    roll.stop()

The heart is a thread of its own: a rank that computes or waits for a peer beats on, one that is dead, stopped or on a
machine that is gone does not.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

BEAT = 0.5  # seconds
SILENCE = 4 * BEAT  # without a beat, after which a rank is said not to answer
ANSWER = timedelta(seconds=5)  # that the store has
LOOK = 0.25  # seconds between two looks of `watch`
HANGS = 16  # looks without a beat, after which a process that is there is said to hang


@dataclass(frozen=True)
class Silent:
    """A rank that does not answer; `host` and `pid` are where it lived, None when it never beat, `words` its last."""

    rank: int
    host: str | None
    pid: int | None
    words: str | None = None

    def __str__(self) -> str:
        return f"rank {self.rank}" + ("" if self.host is None else f" (process {self.pid} on {self.host})")


class Roll:
    """The hearts of all ranks; see the module."""

    def __init__(self) -> None:
        self._store: dist.Store | None = None
        self._world = 0
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, name: str, timeout: timedelta) -> None:
        """Begin to beat under `name`, in the store that torchrun's environment says; it has `timeout` to be found."""
        env = os.environ
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout=timeout, wait_for_workers=False)
        store.set_timeout(ANSWER)
        self._store, self._world = dist.PrefixStore(f"{name}/hearts", store), dist.get_world_size()
        self._stopped = threading.Event()
        self._run("heart", _beat, self._store, dist.get_rank(), self._stopped)

    def stop(self) -> None:
        """Stop beating and watching."""
        self._stopped.set()
        for thread in self._threads:  # one that is in the store when the interpreter ends takes it down with SIGABRT
            if thread is not threading.current_thread():
                thread.join(ANSWER.total_seconds())
        self._threads.clear()
        self._store = None

    def _run(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, name=name, daemon=True))
        self._threads[-1].start()

    def say(self, words: str) -> None:
        """Leave last words; whoever misses us reads them."""
        if self._store is not None:
            with suppress(RuntimeError):  # the store is gone: nobody can read them
                self._store.set(f"{dist.get_rank()}/words", words)

    def watch(self, lost: Callable[[Sequence[Silent]], None]) -> None:
        """Call `lost` once, in a thread of its own, when ranks are gone (within two looks, on this machine) or do not
        beat for `HANGS` looks; with no ranks when the store is gone. `stop` ends it."""
        self._run("watch", self._guard, lost, self._stopped, dist.get_rank())

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

    def _guard(self, lost: Callable[[Sequence[Silent]], None], stopped: threading.Event, me: int) -> None:
        looks = {rank: _Look() for rank in range(self._world) if rank != me}
        while not stopped.wait(LOOK):
            try:
                beats = self._beats()
                missed = [(rank, beats[rank]) for rank, look in looks.items() if look.misses(beats[rank])]
                found = [self._describe(rank, beat) for rank, beat in missed]
            except RuntimeError:
                found = []
            else:
                if not missed:
                    continue
            if not stopped.is_set():
                lost(found)
            return

    def _describe(self, rank: int, beat: bytes | None) -> Silent:
        store = self._store
        words = store.get(f"{rank}/words").decode() if store and store.check([f"{rank}/words"]) else None
        host, pid, _ = json.loads(beat) if beat is not None else (None, None, None)
        return Silent(rank, host, pid, words)

    def _beats(self) -> list[bytes | None]:
        store = self._store
        if store is None:
            raise RuntimeError("the roll has stopped")
        keys = [str(rank) for rank in range(self._world)]
        return [store.get(key) if store.check([key]) else None for key in keys]


class _Look:
    """What is known of another rank's heart."""

    def __init__(self) -> None:
        self.beat: bytes | None = None
        self.quiet = 0
        self.seen = False

    def misses(self, beat: bytes | None) -> bool:
        """Whether the rank is missed. Looks are counted, not seconds: when all of us are stopped, nobody is missed."""
        self.quiet = self.quiet + 1 if beat == self.beat else 0
        self.beat = beat
        if beat is None:
            return self.quiet >= HANGS
        host, pid, _ = json.loads(beat)
        lives = host == socket.gethostname() and _lives(pid)
        gone = self.seen and not lives  # one that was never seen may live in another container
        self.seen = self.seen or lives
        return gone or self.quiet >= HANGS


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _beat(store: dist.Store, rank: int, stopped: threading.Event) -> None:
    count = 0
    while not stopped.wait(BEAT if count else 0.0):
        count += 1
        try:
            store.set(str(rank), json.dumps([socket.gethostname(), os.getpid(), count]))
        except RuntimeError:
            return  # the store is gone, and the run with it
