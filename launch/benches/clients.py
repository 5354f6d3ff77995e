"""The processes that send the requests: this one, or several where one is not fast enough.

As a program: what to send (JSON) on stdin, then the beginning (s) when all are ready; the answers (JSON) on stdout.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .online import Answer, Ask, Target, run

AHEAD = 0.05  # seconds from when all clients are ready to the beginning


def drive(
    target: Target, asks: Sequence[Ask], seats: int | None = None, clients: int = 1
) -> tuple[list[Answer], float]:
    """Send the requests; the answers in the same order, and the share of its time that the busiest client computed.

    Near 1 the client measures itself: take more of them.

    Args:
        target: whom to ask.
        asks: the requests.
        seats: of a closed loop, over all clients; None = an open one.
        clients: processes; no more than there are requests and seats.
    """
    clients = min(clients, len(asks), seats or clients)
    if clients == 1:
        return _measured(target, asks, seats, None)
    parts = [list(asks[at::clients]) for at in range(clients)]
    shares = [None if seats is None else len(range(at, seats, clients)) for at in range(clients)]
    children = [_child(target, part, seat) for part, seat in zip(parts, shares, strict=True)]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        begin = f"{time.perf_counter() + AHEAD}\n"  # a clock that all processes of a machine share
        for child in children:
            assert child.stdin is not None
            child.stdin.write(begin)
            child.stdin.flush()
        told = [json.loads(child.communicate()[0]) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    found: list[Answer | None] = [None] * len(asks)
    for at, one in enumerate(told):
        found[at::clients] = [Answer(**{**a, "times": tuple(a["times"])}) for a in one["answers"]]
    return [answer for answer in found if answer is not None], max(one["share"] for one in told)


def main() -> None:
    """One of several clients."""
    told = json.loads(sys.stdin.readline())
    asks = [
        Ask(**{**a, "prompt": a["prompt"] if isinstance(a["prompt"], str) else tuple(a["prompt"])})
        for a in told["asks"]
    ]
    print("ready", flush=True)
    target = Target(**{**told["target"], "without": tuple(told["target"]["without"])})
    answers, share = _measured(target, asks, told["seats"], float(sys.stdin.readline()))
    json.dump({"answers": [asdict(answer) for answer in answers], "share": share}, sys.stdout)


def _measured(
    target: Target, asks: Sequence[Ask], seats: int | None, start: float | None
) -> tuple[list[Answer], float]:
    gc.collect()
    gc.freeze()  # a collection that looks through torch's objects takes tens of milliseconds
    try:
        wall, own = time.perf_counter(), time.thread_time()
        answers = run(target, asks, seats, start=start)
        return answers, (time.thread_time() - own) / (time.perf_counter() - wall)
    finally:
        gc.unfreeze()


def _child(target: Target, asks: Sequence[Ask], seats: int | None) -> "subprocess.Popen[str]":
    words = (sys.executable, "-m", "turnout.launch.benches.clients")
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 (our own)
    wanted: dict[str, Any] = {"target": asdict(target), "asks": [asdict(ask) for ask in asks], "seats": seats}
    assert child.stdin is not None
    child.stdin.write(json.dumps(wanted) + "\n")
    child.stdin.flush()
    return child


if __name__ == "__main__":
    main()
