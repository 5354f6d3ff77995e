"""All ranks of one attempt meet: they agree on a name that no earlier attempt had.

torchrun's restarts keep one store, with every key that dead ranks left in it, and the count of restarts is not the same
on every machine. So each rank says hello with a number of its own, rank 0 proposes a name for the hellos that it sees,
every rank that finds its hello in the proposal accepts it, and when all have, rank 0 says go. A hello of a dead rank is
never answered: when its successor's comes, rank 0 proposes again.
"""

import json
import time
import uuid
from collections.abc import Iterator

import torch.distributed as dist

LONGEST_NAP = 0.2  # seconds between two looks


def meet(store: dist.Store, rank: int, world: int, timeout: float) -> str:
    """The name of this attempt, the same on its `world` ranks and unlike any other. Collective.

    Raises:
        RuntimeError: some rank did not come in time; it is named where that is known.
    """
    mine = uuid.uuid4().hex
    store.set(f"hello/{rank}", mine)
    return _propose(store, world, timeout) if rank == 0 else _accept(store, rank, mine, timeout)


def _propose(store: dist.Store, world: int, timeout: float) -> str:
    told: list[str | None] = []
    name = ""
    for _ in _looks(timeout):
        hellos = [_read(store, f"hello/{rank}") for rank in range(world)]
        if None not in hellos and hellos != told:
            told, name = hellos, uuid.uuid4().hex
            store.set("proposal", json.dumps([name, told]))
        if told and store.add(f"accepted/{name}", 0) == world - 1:
            store.set(f"go/{name}", "")
            return name
    missing = [f"rank {rank}" for rank, hello in enumerate(hellos) if hello is None]
    raise RuntimeError(f"timed out: {', '.join(missing) or 'a restarted rank'} did not come in {timeout:g} seconds")


def _accept(store: dist.Store, rank: int, mine: str, timeout: float) -> str:
    accepted = ""
    for _ in _looks(timeout):
        name, hellos = json.loads(_read(store, "proposal") or '["", {}]')
        if not hellos or hellos[rank] != mine:
            continue
        if name != accepted:
            store.add(f"accepted/{name}", 1)
            accepted = name
        if store.check([f"go/{name}"]):
            return name
    raise RuntimeError(f"timed out: not every rank came in {timeout:g} seconds")


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _looks(timeout: float) -> Iterator[None]:
    deadline, nap = time.monotonic() + timeout, 0.005
    while time.monotonic() < deadline:
        yield
        time.sleep(nap)
        nap = min(1.5 * nap, LONGEST_NAP)
