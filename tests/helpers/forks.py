"""Processes that cost no import of torch: forked from a server that has imported everything, to be killed at will.

    children = start_ranks(function, 2, "argument")      # each joins the group, then calls function("argument")
    children[1].kill()
    assert ends(children) == [5, -9]                      # exit codes; 5 for a PeerError, as of a run

The server starts once per test session; a child inherits the environment that the server had.
"""

import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from turnout.tests.helpers.ranks import address, context, load

TIMEOUT = 240


def start(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """One process without peers; an integer that `function` returns is its exit code."""
    child = context.Process(target=_alone, args=(address(function), args))
    child.start()
    return child


def start_ranks(function: Callable[..., Any], world: int, *args: Any, group_timeout: float = 60.0) -> list[BaseProcess]:
    """`world` processes that call `function(*args)` as ranks of one group."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    children = []
    for rank in range(world):
        env = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        child = context.Process(target=_rank, args=(address(function), args, env, group_timeout))
        child.start()
        child.store = store  # it lives as long as somebody may ask it
        children.append(child)
    return children


def ends(children: Sequence[BaseProcess]) -> list[int | None]:
    """Every child's exit code, after it ended; None when it did not in time and had to be killed."""
    codes = []
    for child in children:
        child.join(TIMEOUT)
        codes.append(child.exitcode)
        child.kill()
        child.join()
    return codes


def _alone(function: tuple[str, str], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    sys.exit(load(*function)(*args))


def _rank(function: tuple[str, str], args: tuple[Any, ...], env: dict[str, str], group_timeout: float) -> None:
    import torch

    from turnout import PeerError
    from turnout.parallel import process

    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        process.start(group_timeout, "cpu")
        code = load(*function)(*args)
        process.stop()
    except PeerError:
        os._exit(5)
    sys.exit(code)
