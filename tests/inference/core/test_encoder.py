"""Requests with an encoder's input: its blocks, its share of the budget, and what can never run. Blocks of 4 tokens."""
# ruff: noqa: N802 (O12 is the name of a rule)

import pytest

from turnout import RequestError
from turnout.inference.core.request import Request, Status
from turnout.inference.core.sampling import SamplingParams

START = 1


def request(name: str, size: int, max_tokens: int | None = 3, first: int = 0, **fields) -> Request:
    """`size` tokens for the encoder, from `first` on; the decoder begins with one token."""
    source = range(first, first + size)
    return Request(name, [START], SamplingParams(max_tokens=max_tokens), encoder_token_ids=source, **fields)


def add(server, name: str, size: int, *args, **fields) -> Request:
    made = request(name, size, *args, **fields)
    server.scheduler.add(made)
    return made


def test_an_input_is_read_whole_in_the_step_in_which_its_request_starts(bench):
    server = bench()
    source = add(server, "a", 9)
    first = server.scheduler.schedule()
    (item,) = first.scheduled
    assert (item.encoded, item.count, item.cost, first.num_tokens) == (9, 1, 10, 10)
    assert (len(item.memory_table), len(item.block_table)) == (3, 1)
    server.commit(first)
    second = server.scheduler.schedule()
    (item,) = second.scheduled
    assert (item.encoded, item.start, second.num_tokens) == (0, 1, 1)
    assert item.memory_table == source.memory_table
    server.commit(second)
    server.drain()
    assert (server.blocks.usage, server.blocks.memories) == (0, {})


def test_an_input_waits_for_a_step_that_can_hold_it_and_nobody_overtakes(bench):
    server = bench(max_num_batched_tokens=10, max_num_seqs=4)
    add(server, "a", 4, first=0)
    add(server, "b", 9, first=100)
    add(server, "c", 1, first=200)
    assert server.step() == {"a": 1}, "5 of 10 tokens are left, b needs 10"
    assert server.step() == {"a": 1}
    assert server.step() == {"a": 1}, "its last"
    assert server.step() == {"b": 1}
    assert server.step() == {"b": 1, "c": 1}
    server.drain()


def test_O12_a_resumed_request_reads_its_input_again_beside_a_chunk_of_its_own_tokens(bench):
    server = bench(usable=8, max_num_batched_tokens=9, max_num_seqs=2)
    victim = add(server, "a", 6, 9, priority=1)
    for _ in range(6):
        server.step()
    for name in "bc":
        server.add(name, prompt=1, max_tokens=2)
    server.step()
    assert victim.status is Status.PREEMPTED, "two seats"
    server.step()
    plan = server.scheduler.schedule()
    assert [(i.encoded, i.start, i.count, i.samples) for i in plan.scheduled] == [(6, 4, 3, True)], "4 were cached"
    server.commit(plan)
    server.drain()


def test_O12_choices_of_one_request_share_a_memory(bench):
    server = bench()
    group = [request(f"a/{i}", 8, 2 + i, choice=i) for i in range(3)]
    server.scheduler.add(*group)
    plan = server.scheduler.schedule()
    assert [item.encoded for item in plan.scheduled] == [8, 0, 0]
    (memory,) = {item.memory_table for item in plan.scheduled}
    assert [server.blocks.counts[block] for block in memory] == [3, 3]
    server.commit(plan)
    server.step()
    assert group[0].finish_reason == "length"
    assert [server.blocks.counts[block] for block in memory] == [2, 2]
    server.scheduler.abort("a/1")
    assert [server.blocks.counts[block] for block in memory] == [1, 1]
    server.drain()
    assert server.blocks.usage == 0


@pytest.mark.parametrize(
    ("changes", "config"),
    [({"cache_salt": "tenant"}, {}), ({"first": 1}, {}), ({}, {"enable_prefix_caching": False})],
    ids=["salt", "input", "no caching"],
)
def test_O12_others_have_memories_of_their_own(bench, changes, config):
    server = bench(**config)
    add(server, "a", 8)
    add(server, "b", 8, **changes)
    plan = server.scheduler.schedule()
    assert [item.encoded for item in plan.scheduled] == [8, 8]
    assert len({*plan.scheduled[0].memory_table, *plan.scheduled[1].memory_table}) == 4
    server.commit(plan)
    server.drain()


def test_an_input_of_higher_priority_takes_the_budget_of_lower_ones(bench):
    server = bench(max_num_batched_tokens=10, max_num_seqs=3)
    low = server.add("low", max_tokens=9, priority=1)
    server.step()
    add(server, "high", 9)
    assert server.step() == {"high": 1}
    assert low.status is Status.PREEMPTED
    server.drain()


@pytest.mark.parametrize(
    ("size", "max_tokens", "message"),
    [
        (0, 3, r"prompt \(0 tokens\) must have at least one token"),
        (31, 3, r"prompt \(31 tokens, the encoder's input\) must not exceed 30 \(max_model_len\)"),
        (24, 3, r"must not exceed 23 \(max_num_batched_tokens - 1: the encoder reads it in one step\)"),
        (23, 30, r"start token \(1\) \+ max_tokens \(30\) must not exceed max_model_len \(30\)"),
    ],
)
def test_what_can_never_run_is_refused(bench, size, max_tokens, message):
    server = bench(max_model_len=30, max_num_batched_tokens=64 if size > 30 else 24, max_num_seqs=4)
    with pytest.raises(RequestError, match=message):
        add(server, "a", size, max_tokens)
    assert server.scheduler.requests == {}


def test_input_and_output_must_fit_the_pool_together(bench):
    server = bench(usable=4)
    with pytest.raises(RequestError, match=r"must not exceed 12 \(the KV cache without one block, the decoder's\)"):
        add(server, "a", 13)
    with pytest.raises(RequestError, match=r"start token \(1\) \+ max_tokens \(9\) must not exceed the KV cache \(8"):
        add(server, "b", 8, 9)
    most = add(server, "c", 8, None)
    assert most.max_tokens == 8
    server.drain()
    assert most.num_output_tokens == 8
    assert most.num_preemptions == 0


def test_input_and_output_have_a_limit_each(bench):
    server = bench(max_model_len=8)
    longest = add(server, "a", 8, 7)
    server.drain()
    assert (longest.num_output_tokens, longest.finish_reason) == (7, "length")


@pytest.mark.parametrize("state", ["waiting", "launched", "decoding", "preempted"])
def test_O12_an_abort_frees_the_memory_once(bench, state):
    server = bench(usable=4, max_num_seqs=2)
    add(server, "a", 4, 8)
    victim = add(server, "b", 4, 8, first=50)
    plan = None
    if state == "launched":
        plan = server.scheduler.schedule()
    elif state != "waiting":
        server.step()
        while state == "preempted" and victim.status is not Status.PREEMPTED:
            server.step()
    assert server.scheduler.abort("b") is victim
    assert server.scheduler.abort("b") is None
    if plan:
        assert victim.memory_table, "the launched step still writes it"
        server.commit(plan)
    assert victim.memory_table == ()
    assert server.blocks.num_available + sum(map(bool, server.blocks.counts)) == 4
    server.drain()
    assert (server.blocks.usage, server.blocks.memories) == (0, {})


def test_the_maker_of_a_memory_may_go_before_those_who_share_it(bench):
    server = bench()
    maker, sharer = request("a", 8), request("b", 8)
    server.scheduler.add(maker, sharer)
    plan = server.scheduler.schedule()
    server.scheduler.abort("a")
    server.commit(plan)
    assert [server.blocks.counts[block] for block in sharer.memory_table] == [1, 1]
    assert server.scheduler.schedule().scheduled[0].encoded == 0
