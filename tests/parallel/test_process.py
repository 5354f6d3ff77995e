"""Processes: collectives on host values, and a lost peer answered by a named error."""

import os
import signal
import time

import pytest
import torch

from turnout import PeerError
from turnout.parallel import process
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


def lose_rank_1(how: int) -> str:
    process.barrier()
    if process.rank() == 1:
        os.kill(os.getpid(), how)
        time.sleep(60)
    try:
        process.all_sum(torch.ones(4), "sum of the test")
    except PeerError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_peer_becomes_a_named_error_within_the_timeout(how):
    message, lost = run_ranks(lose_rank_1, 2, int(how), group_timeout=3.0, timeout=40, dies=(1,))
    assert message.startswith("sum of the test failed on rank 0: a peer is gone or hangs")
    assert lost is None


def fail_on_rank_1() -> int:
    if process.rank() == 1:
        raise ValueError("a reason to read")
    return process.rank()


def test_the_rank_helper_reports_the_traceback_of_the_failing_rank():
    with pytest.raises(RankError, match="a reason to read"):
        run_ranks(fail_on_rank_1, 2)
    assert run_ranks("turnout.parallel.process:rank", 2) == [0, 1]
