"""Processes: collectives on host values, and a lost peer answered by a named error."""

import os
import signal
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from turnout import PeerError
from turnout.parallel import process
from turnout.parallel.meeting import meet
from turnout.tests.helpers.ranks import RankError, run_ranks


def collectives() -> dict:
    me = process.rank()
    process.barrier()
    return {
        "sum": process.all_sum(torch.tensor([1.0 + me, 2.0])).tolist(),
        "broadcast": process.broadcast_json({"from": me, "text": "é" * me}),
        "gather": process.gather_json(["x" * 5 * me, me]),
        "world": process.world(),
    }


def test_collectives_agree_on_every_rank():
    expected = {"sum": [3.0, 4.0], "broadcast": {"from": 0, "text": ""}, "gather": [["", 0], ["xxxxx", 1]], "world": 2}
    assert run_ranks(collectives, 2) == [expected, expected]


def test_a_world_of_one_needs_no_group():
    assert process.world() == 1
    assert process.rank() == 0
    value = torch.ones(2)
    assert process.all_sum(value).data_ptr() != value.data_ptr()
    assert process.gather_json({"a": 1}) == [{"a": 1}]
    assert process.broadcast_json("x") == "x"


def lose_rank_1(how: int | None) -> tuple[str, tuple[int, ...]]:
    """Rank 1 sends itself a signal, or only sleeps; what rank 0 is told, and the processes that it is to end."""
    process.barrier()
    if process.rank() == 1:
        if how is not None:
            os.kill(os.getpid(), how)
        time.sleep(60)
    try:
        process.all_sum(torch.ones(4), "sum of the test")
    except PeerError as error:
        return str(error), error.silent
    return "no error", ()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_peer_is_named_within_the_timeout(how):
    (message, silent), lost = run_ranks(lose_rank_1, 2, int(how), group_timeout=3.0, timeout=40, dies=(1,))
    assert message.startswith("sum of the test failed on rank 0: a peer is gone or hangs: rank 1 (process ")
    assert f"on {socket.gethostname()}) does not answer" in message
    assert len(silent) == 1
    assert str(silent[0]) in message
    assert lost is None


def test_a_peer_that_lives_but_does_not_come_is_not_called_dead():
    (message, silent), _ = run_ranks(lose_rank_1, 2, None, group_timeout=6.0, timeout=60, dies=(1,))
    assert "every rank still answers, so one of them hangs" in message
    assert silent == ()


def lose_two() -> str:
    if process.rank() in (1, 2):
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        process.barrier()
    except PeerError as error:
        return str(error)
    return "no error"


@pytest.mark.full
def test_every_survivor_names_every_lost_peer():
    messages = run_ranks(lose_two, 4, group_timeout=10.0, timeout=60, dies=(1, 2))
    for rank in (0, 3):
        assert f"on rank {rank}: " in messages[rank]
        assert "rank 1 (process" in messages[rank]
        assert "rank 2 (process" in messages[rank]
        assert f"rank {3 - rank} (process" not in messages[rank]


def fail_on_rank_1() -> int:
    if process.rank() == 1:
        raise ValueError("a reason to read")
    return process.rank()


def test_the_rank_helper_reports_the_traceback_of_the_failing_rank():
    with pytest.raises(RankError, match="a reason to read"):
        run_ranks(fail_on_rank_1, 2)
    assert run_ranks("turnout.parallel.process:rank", 2) == [0, 1]


def test_attempts_on_one_store_never_meet_each_other():
    """Rank 1 of the first attempt dies after its hello; the second attempt's ranks come one by one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def come(rank, found, timeout=20.0):
        mine = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        found[rank] = meet(mine, rank, 3, timeout)

    def attempt(ranks, pause):
        found = {}
        threads = [threading.Thread(target=come, args=(rank, found)) for rank in ranks]
        for thread in threads:
            thread.start()
            time.sleep(pause)
        for thread in threads:
            thread.join()
        return found

    store.set("hello/1", "of a rank that is dead")
    names = [attempt(order, pause) for order, pause in (((0, 2, 1), 0.3), ((1, 2, 0), 0.1), ((0, 1, 2), 0.0))]
    assert all(len(set(found.values())) == 1 and len(found) == 3 for found in names)
    assert len({found[0] for found in names}) == 3


def test_a_rank_that_does_not_come_is_named():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError, match=r"timed out: rank 1, rank 2 did not come in 0\.1 seconds"):
        meet(store, 0, 3, 0.1)
    with pytest.raises(RuntimeError, match="not every rank came"):
        meet(store, 1, 3, 0.1)
