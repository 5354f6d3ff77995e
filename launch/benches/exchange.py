"""Two processes of this machine exchange numbers, as expert parallelism does: right, and how fast.

ranks.run("turnout.launch.benches.exchange", [PATH], world=2, timeout=60)
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ... import PeerError
from ...parallel import process
from .. import main as cli
from .. import ranks

TIMEOUT = 60.0  # seconds
NUMBERS = 1 << 18  # float32 that each rank sends: 1 MiB
ROUNDS = 5


def exchange(path: Path) -> int:
    """Exchange as one of the ranks; rank 0 writes the milliseconds of one exchange to `path`.

    Raises:
        PeerError: a peer is gone, or what came is not what was sent.
    """
    process.start(TIMEOUT, "cpu")
    rank, world = process.rank(), process.world()
    sent = torch.arange(NUMBERS, dtype=torch.float32) + rank
    times = []
    for _ in range(ROUNDS):
        found = torch.full_like(sent, float("nan"))
        process.barrier()
        start = time.perf_counter()
        with process.naming("exchange of 1 MiB"):
            dist.all_to_all_single(found, sent)
        times.append(1e3 * (time.perf_counter() - start))
    mine = torch.arange(NUMBERS, dtype=torch.float32).chunk(world)[rank]
    if not torch.equal(found, torch.cat([mine + other for other in range(world)])):
        raise PeerError("what came is not what was sent: gloo is broken here, reinstall torch")
    process.barrier()
    if rank == 0:
        path.write_text(json.dumps({"ms": statistics.median(times)}), encoding="utf-8")
    process.stop()
    return 0


def main(args: list[str]) -> int:
    """What a rank does that `ranks.run` has started."""
    return ranks.play(lambda: exchange(Path(args[0])), lambda: exchange(Path(args[0])))


if __name__ == "__main__":
    assert "RANK" in os.environ, "started by ranks.run"
    sys.exit(cli.run(main, sys.argv[1:]))
