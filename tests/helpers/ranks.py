"""Run a function on N real gloo ranks: `results = run_ranks(function, 2, "argument")`.

    from turnout.tests.helpers.ranks import run_ranks

    def sums(value):                      # at module level; inside, the process group of 2 ranks stands
        return float(process.all_sum(torch.tensor(value)))

    def test_ranks_sum():
        assert run_ranks(sums, 2, 1.5) == [3.0, 3.0]

The ranks are forked from a server that has imported everything (importing torch costs seconds), once per test session,
and reused: every call gets a new process group, a new store on a free port, seed 0, the environment as it was. A rank
that raises, dies or runs past `timeout` fails the test with every rank's traceback, and its pool is replaced.
`fresh=True` takes processes of its own, for functions that leave something behind in the process. Arguments and results
travel through multiprocessing pipes.
"""

import atexit
import functools
import importlib
import importlib.util
import inspect
import multiprocessing as mp
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = [
    "turnout.parallel.checkpoint.reader", "turnout.moe.train.loop", "turnout.launch.rank", "turnout.launch.compose",
    "hydra._internal.hydra", "torch._dynamo", "torch.profiler", "numpy.ma",
]  # fmt: skip
GRACE = 10.0  # seconds that the other ranks get to report after the first failure

context = mp.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


class RankError(AssertionError):
    """A rank raised, died or hung; the message carries every rank's traceback."""


def run_ranks(
    function: Callable[..., Any] | str,
    world: int,
    *args: Any,
    timeout: float = 120.0,
    group_timeout: float = 60.0,
    dies: tuple[int, ...] = (),
    fresh: bool = False,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `function(*args)` on `world` ranks and return what each returned, by rank.

    Args:
        function: a module-level function (any file, also a test file) or "module:name".
        timeout: seconds for the whole call.
        group_timeout: seconds until a collective gives up on a peer.
        dies: ranks that are expected to die or hang; their result is None, and nobody waits for them.
        fresh: run in new processes that end with the call.
        env: environment variables set during the call (when `fresh` before anything but PRELOAD is imported).

    Raises:
        RankError: a rank raised, died unexpectedly or did not finish in time.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    alone = fresh or bool(dies)
    pool = _Pool() if alone else _shared_pool()
    ok = False
    try:
        setup = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            **(env or {}),
        }
        ranks = [setup | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
        pool.send([(address(function), args, group_timeout, rank_env) for rank_env in ranks])
        results = pool.collect(world, timeout, dies)
        ok = True
        return results
    finally:
        if alone or not ok:
            pool.close()


class _Pool:
    """Processes, one a rank, each serving calls from its pipe until it is closed."""

    def __init__(self) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []
        atexit.register(self.close)

    def send(self, calls: list[Any]) -> None:
        while len(self.workers) < len(calls):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
            self.workers.append((worker, ours))
        for (_, pipe), call in zip(self.workers, calls, strict=False):
            pipe.send(call)

    def collect(self, world: int, timeout: float, dies: tuple[int, ...]) -> list[Any]:
        results: list[Any] = [None] * world
        failures: dict[int, str] = {}
        pending = {self.workers[r][1]: r for r in range(world)}
        deadline = time.monotonic() + timeout
        while set(pending.values()) - set(dies) and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(pending), timeout=left):
                rank = pending.pop(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    worker = self.workers[rank][0]
                    worker.join(5)
                    good, value = rank in dies, None if rank in dies else f"died, exit code {worker.exitcode}"
                if good:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in set(pending.values()) - set(dies):
            failures[rank] = "did not finish (waits for a peer that failed, or ran past the time-out)"
        if failures:
            raise RankError("\n".join(f"--- rank {r} of {world}: {text}" for r, text in failures.items()))
        return results

    def close(self) -> None:
        atexit.unregister(self.close)
        for worker, pipe in self.workers:
            pipe.close()
            worker.kill()
        for worker, _ in self.workers:
            worker.join()
        self.workers.clear()


@functools.cache
def _shared_pool() -> _Pool:
    return _Pool()


def address(function: Callable[..., Any] | str) -> tuple[str, str]:
    """Where another process finds `function`: by file, for the name of a test's module depends on the checkout's."""
    if isinstance(function, str):
        module, name = function.split(":")
        return module, name
    return str(inspect.getsourcefile(function)), function.__qualname__


def load(module: str, name: str) -> Callable[..., Any]:
    """The function that `address` wrote down."""
    return getattr(_module(module), name)


@functools.cache
def _module(module: str) -> Any:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    name = "ranks_" + Path(module).with_suffix("").as_posix().replace("/", "_").strip("_")
    spec = importlib.util.spec_from_file_location(name, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def _serve(pipe: Connection) -> None:
    while True:
        try:
            (module, name), args, group_timeout, env = pipe.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(env)
        pipe.send(_call(module, name, args, group_timeout))


def _call(module: str, name: str, args: tuple[Any, ...], group_timeout: float) -> tuple[bool, Any]:
    import torch

    from turnout.parallel import process

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        process.start(group_timeout, "cpu")
        return True, load(module, name)(*args)
    except BaseException:  # noqa: BLE001  whatever it is, it belongs into the test's report
        return False, traceback.format_exc()
    finally:
        process.stop()
