"""This process among its peers: start and stop the process group, and the few collectives on host values.

torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) says who takes part. A world of one has
no process group at all, and every function here then answers without communication. A peer that dies or hangs becomes
a `PeerError` that names the operation. Between ranks travel tensors and JSON bytes, never pickled objects.
"""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .. import PeerError
from .meeting import meet
from .roll import Roll, Silent

_PEER_TROUBLE = re.compile(r"gloo|nccl|timed? ?out|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


def start(timeout: float = 120.0, device_type: str | None = None) -> None:
    """Join the process group that torchrun's environment describes; does nothing in a world of one.

    Args:
        timeout: seconds until a collective (or the rendezvous) gives up on a peer.
        device_type: "cuda" or "cpu"; None takes a GPU when every local rank has one of its own.

    Raises:
        PeerError: the other ranks did not appear in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    device = local_device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with naming("start of the process group"):
        limit = timedelta(seconds=timeout)
        shared, me, size = next(dist.rendezvous("env://", timeout=limit))
        name = meet(dist.PrefixStore("turnout", shared), me, size, timeout)
        store = dist.PrefixStore(name, shared)
        dist.init_process_group(backend, store=store, rank=me, world_size=size, timeout=limit)
        _ROLL.start(name, limit)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        _ROLL.stop()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in the world; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device_type: str | None = None) -> torch.device:
    """The device of this rank: its own GPU when every rank of this machine has one, else the CPU."""
    if device_type is None:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        device_type = "cuda" if torch.cuda.device_count() >= neighbours else "cpu"
    return torch.device(device_type, int(os.environ.get("LOCAL_RANK", "0"))) if device_type == "cuda" else _CPU


@contextmanager
def naming(operation: str) -> Iterator[None]:
    """Turn a failed collective inside the block into a `PeerError` that says which operation, where, why, and which
    rank does not answer (for which it watches the others' hearts for `roll.SILENCE` seconds)."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerError) or not (isinstance(error, dist.DistError) or _PEER_TROUBLE.search(str(error))):
            raise
        me, cause = os.environ.get("RANK", "0"), str(error).strip().splitlines()[0][:300]
        silent = _ROLL.silent() if dist.is_initialized() else None
        who = "every rank still answers, so one of them hangs"
        if silent is None:
            who = "which one is not known"
        elif silent:
            who = f"{', '.join(map(str, silent))} {'does' if len(silent) == 1 else 'do'} not answer"
        here = socket.gethostname()
        raise PeerError(
            f"{operation} failed on rank {me}: a peer is gone or hangs: {who} ({cause}): see its log",
            silent=tuple(each.pid for each in silent or () if each.host == here and each.pid is not None),
        ) from error


def watch(lost: Callable[[Sequence[Silent]], None]) -> None:
    """Call `lost`, in a thread of its own, as soon as ranks are gone or hang: at most once, until `stop`."""
    _ROLL.watch(lost)


def say(words: str) -> None:
    """Leave last words for the ranks that will miss this one."""
    _ROLL.say(words)


def unwatch() -> None:
    """This rank and the others are about to end: nobody is missed from now on."""
    _ROLL.stop()


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        with naming("barrier"):
            dist.all_reduce(torch.zeros(1))


def all_sum(
    tensor: torch.Tensor, operation: str = "sum over all ranks", group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The element-wise sum of `tensor` (same shape and dtype everywhere) over a group's ranks (None: all), as a new
    tensor."""
    total = tensor.detach().clone()
    if world() > 1:
        with naming(operation):
            dist.all_reduce(total, group=group)
    return total


def broadcast_json(value: Any) -> Any:
    """Rank 0's `value` (plain JSON types) on every rank; what the others pass is ignored."""
    if world() == 1:
        return value
    data = json.dumps(value).encode() if rank() == 0 else b""
    with naming("broadcast of rank 0's settings"):
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0)
        payload = _as_tensor(data, int(size))
        dist.broadcast(payload, src=0)
    return json.loads(bytes(payload.tolist()))


def gather_json(value: Any) -> list[Any]:
    """Every rank's `value` (plain JSON types), by rank, on every rank."""
    if world() == 1:
        return [value]
    data = json.dumps(value).encode()
    with naming("gathering of every rank's report"):
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        payloads = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(payloads, _as_tensor(data, longest))
    return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(payloads, sizes, strict=True)]


_CPU = torch.device("cpu")
_ROLL = Roll()  # of the process group, which is this process's as well


def _as_tensor(data: bytes, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(max(size, 1), b"\0")), dtype=torch.uint8)[:size]
