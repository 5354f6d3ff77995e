"""The processes of one server or one generation on several ranks of this machine: started, waited for, ended together.

Rank 0 is the one that people deal with: it gets the signals that reach us, its exit code is ours. Whoever else ends
before it has failed; rank 0 notices by itself and says why. Nothing outlives us: when we die, the kernel kills the
ranks.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from .. import PeerError
from ..configs.typed import check
from ..inference.config import EngineConfig
from ..inference.layout import check_layout
from ..parallel.config import ParallelConfig
from .main import LOST, exit_code

NOTICE = 20.0  # seconds that rank 0 has to notice a lost rank and to end
LOOK = 0.05
DEFECT = 1  # exit code
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class Several:
    """What a verb takes whose model several ranks may compute.

    Args:
        nproc: ranks on this machine.
        parallel: what they divide.
    """

    nproc: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check(self.nproc >= 1, "nproc", self.nproc, "must be at least 1", "use nproc=2")
        check_layout(self.parallel, int(os.environ.get("WORLD_SIZE", self.nproc)))


def is_rank() -> bool:
    """Whether torchrun, or `run` below, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run(module: str, words: Sequence[str], world: int, timeout: float) -> int:
    """Run `python -m module words` as so many ranks; returns the exit code.

    Args:
        timeout: seconds until a collective gives up, as the ranks know it.
    """
    from torch.distributed import TCPStore

    from .launcher import environment

    # Where the ranks meet; ours, so that it outlives each of them.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = environment(os.environ, world, timeout) | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return _Family([sys.executable, "-m", module, *words], shared, world).wait()


class _Family:
    """The ranks' processes."""

    def __init__(self, command: list[str], shared: dict[str, str], world: int) -> None:
        self._ranks = [
            subprocess.Popen(  # noqa: S603 (our own program)
                command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True
            )
            for rank in range(world)
        ]

    def wait(self) -> int:
        """The exit code of rank 0, or that of a lost peer, once all have ended."""
        main_thread = threading.current_thread() is threading.main_thread()  # signals can be taken over only there
        earlier = {number: signal.signal(number, self._pass_on) for number in SIGNALS if main_thread}
        try:
            return self._wait()
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            for rank in self._ranks:  # rank 0 has ended, so they have nothing left to do
                rank.kill()
                rank.wait()

    def _wait(self) -> int:
        first, others = self._ranks[0], self._ranks[1:]
        while first.poll() is None and not any(other.poll() for other in others):
            time.sleep(LOOK)
        failed = [number for number, other in enumerate(others, 1) if other.poll()]
        try:
            code = first.wait(NOTICE if failed else None)
        except subprocess.TimeoutExpired:
            return _lost(f"rank 0 did not end {NOTICE:g} s after rank {failed[0]}: it is ended")
        if code < 0:
            return _lost(f"rank 0 (process {first.pid}) was ended by {signal.Signals(-code).name}")
        if code == 0 and failed:
            return _lost(f"rank {failed[0]} ended with code {self._ranks[failed[0]].returncode} before rank 0")
        return code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._ranks[0].send_signal(number)


def follow(path: str, config: EngineConfig, several: Several) -> int:
    """Compute what rank 0 orders, until it ends."""
    from ..inference.engine import Engine
    from ..inference.ranks import Ranks

    ranks = Ranks.join(several.parallel, config)
    assert ranks is not None, "one of several"
    Engine.from_path(path, config, ranks=ranks)
    ranks.follow()
    return 0


def play(lead: Callable[[], int], follow: Callable[[], int]) -> int:
    """What this process does as one of several ranks; its exit code. After an error it does not return: the other ranks
    may stand in an exchange that never ends, and so would the end of this process."""
    from .rank import end_with_parent

    end_with_parent()
    leads = os.environ["RANK"] == "0"
    if not leads:
        for number in SIGNALS:  # rank 0 decides; whoever signals all of us means it
            signal.signal(number, signal.SIG_IGN)
    try:
        return lead() if leads else follow()
    except BaseException as error:  # noqa: BLE001 (whatever it is, the other ranks must learn it)
        _end(error, leads)


def _end(error: BaseException, leads: bool) -> NoReturn:
    from ..parallel import process
    from .rank import end_neighbours

    code = exit_code(error)
    if code == DEFECT:
        traceback.print_exception(error)
    reason = str(error) or type(error).__name__
    process.say(reason)
    if leads:
        print(f"turnout: {reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, PeerError):
        end_neighbours(error.silent)
    os._exit(code)


def _lost(reason: str) -> int:
    print(f"turnout: {reason}", file=sys.stderr, flush=True)
    return LOST
