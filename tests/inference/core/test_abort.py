"""The abort matrix: from every state a request goes at once, leaks nothing, and changes no other request."""

import pytest

from turnout.inference.core.request import Status


def waiting(server):
    server.add("before", max_tokens=9)
    server.step()
    return server.add("victim")


def mid_chunk(server):
    victim = server.add("victim", prompt=14)
    server.step()
    assert 0 < victim.num_computed_tokens < 14
    return victim


def decoding(server):
    victim = server.add("victim", max_tokens=9)
    while victim.num_output_tokens < 2:
        server.step()
    return victim


def preempted(server):
    server.add("before", prompt=12, max_tokens=5)
    server.step()
    server.step()
    victim = server.add("victim", prompt=3, max_tokens=9)
    while victim.status is not Status.PREEMPTED:
        server.step()
    return victim


@pytest.mark.parametrize("state", [waiting, mid_chunk, decoding, preempted])
@pytest.mark.parametrize("launched", [False, True], ids=["between steps", "in the launched step"])
def test_an_abort_leaves_nothing(bench, state, launched):
    server = bench(usable=5, max_num_seqs=2, max_num_batched_tokens=8)
    victim = state(server)
    output = list(victim.output_token_ids)
    plan = server.scheduler.schedule() if launched else None
    assert server.scheduler.abort("victim") is victim
    assert server.scheduler.abort("victim") is None, "id twice"
    if plan:
        server.commit(plan)
    assert (victim.status, victim.finish_reason, victim.output_token_ids) == (Status.FINISHED, "abort", output)
    assert victim.block_table == []
    server.drain()
    stats = server.scheduler.stats()
    assert (stats.running, stats.waiting, stats.usage) == (0, 0, 0)


def test_the_last_token_already_sampled(bench):
    server = bench()
    request = server.add("a", max_tokens=1)
    server.step()
    assert request.finish_reason == "length"
    assert server.scheduler.abort("a") is None
    assert request.finish_reason == "length", "its one end stands"


def test_one_choice_of_several_finished(bench):
    server = bench()
    first, second = (server.request(f"a/{i}", prompt=6, max_tokens=1 + i, choice=i) for i in range(2))
    server.scheduler.add(first, second)
    server.step()
    assert [server.scheduler.abort(f"a/{i}") for i in range(2)] == [None, second]
    assert (first.finish_reason, second.finish_reason) == ("length", "abort")
    assert server.blocks.usage == 0


def test_an_unknown_id(bench):
    assert bench().scheduler.abort("nobody") is None


@pytest.mark.parametrize("launched", [False, True])
def test_all_at_once(bench, launched):
    server = bench(usable=8, max_num_seqs=2)
    for name in "abcd":
        server.add(name, max_tokens=9)
    server.step()
    plan = server.scheduler.schedule() if launched else None
    for name in "abcd":
        server.scheduler.abort(name)
    if plan:
        assert server.commit(plan) == []
    assert (server.scheduler.requests, server.blocks.usage) == ({}, 0)


def test_a_stop_string_ends_a_request_as_a_stop(bench):
    server = bench()
    request = server.add("a", max_tokens=9)
    server.step()
    assert server.scheduler.finish("a", "stop") is request
    assert (request.finish_reason, server.blocks.usage) == ("stop", 0)
