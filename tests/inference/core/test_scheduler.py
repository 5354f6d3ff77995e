"""The scheduler's progress rules P1 to P10, each followed by hand. Blocks of 4 tokens, every sampled token is 7."""
# ruff: noqa: N802 (P1 is the name of a rule)

import pytest

from turnout import RequestError
from turnout.inference.core.request import QueueFullError, Status


def test_one_rule_covers_prefill_chunks_and_decode(bench):
    server = bench(max_num_seqs=4, max_num_batched_tokens=6)
    server.add("a", prompt=10, max_tokens=3)
    server.add("b", prompt=3, max_tokens=3)
    assert server.step() == {"a": 6}
    assert server.step() == {"a": 4, "b": 2}
    assert server.step() == {"a": 1, "b": 1}
    assert server.step() == {"a": 1, "b": 1}
    assert server.step() == {"b": 1}
    assert not server.scheduler.requests


def test_P1_an_idle_scheduler_plans_and_commits_nothing(bench):
    server = bench()
    plan = server.scheduler.schedule()
    assert (plan.scheduled, plan.num_tokens, server.commit(plan)) == ((), 0, [])


def test_P1_a_prompt_longer_than_the_budget_starts_at_once(bench):
    server = bench(max_num_seqs=1, max_num_batched_tokens=2)
    server.add("a", prompt=7, max_tokens=1)
    assert [server.step()["a"] for _ in range(4)] == [2, 2, 2, 1]


def test_P2_a_lone_request_that_just_fits_finishes_without_preemption(bench):
    server = bench(usable=2)
    request = server.add("a", prompt=5, max_tokens=4)
    server.drain()
    assert (request.finish_reason, request.num_output_tokens, request.num_preemptions) == ("length", 4, 0)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "numbers"),
    [
        (5, 5, "max_tokens", (5, 5, 8)),
        (9, 1, "prompt", (9, 1, 8)),
        (10**4, 1, "prompt", (10**4, 8)),
        (1, 10**30, "max_tokens", (10**30, 8)),
    ],
)
def test_P2_a_request_that_can_never_fit_the_pool_is_refused(bench, prompt, max_tokens, param, numbers):
    server = bench(usable=2)
    with pytest.raises(RequestError) as caught:
        server.add("a", prompt, max_tokens)
    assert caught.value.param == param
    assert all(f"{number}" in str(caught.value) for number in numbers)
    assert not server.scheduler.requests


def test_P3_a_preempted_request_resumes_with_its_tokens(bench):
    server = bench(usable=4, enable_prefix_caching=False)
    server.add("a", prompt=4, max_tokens=9)
    second = server.add("b", prompt=4, max_tokens=9)
    while second.status is not Status.PREEMPTED:
        server.step()
    before = list(second.output_token_ids)
    assert before
    assert (second.block_table, second.num_computed_tokens, server.scheduler.waiting) == ([], 0, [second])
    while second.status is not Status.RUNNING:
        assert second.output_token_ids == before
        server.step()
    assert second.output_token_ids == [*before, 7], "the step that recomputes everything samples the next one"
    server.drain()
    assert (second.num_output_tokens, second.num_preemptions) == (9, 1)


def test_P4_the_victim_has_the_lowest_priority_then_the_latest_arrival(bench):
    server = bench(usable=4, max_num_seqs=3)
    low = server.add("low", prompt=4, max_tokens=9, priority=1)
    first = server.add("first", prompt=3, max_tokens=9)
    last = server.add("last", prompt=3, max_tokens=9)
    victims = []
    while server.scheduler.requests:
        plan = server.scheduler.schedule()
        victims += plan.preempted
        server.commit(plan)
    assert victims[:2] == [low, last]
    assert first.num_preemptions == 0


def test_P4_a_preempted_request_comes_before_later_ones_of_its_class(bench):
    server = bench(usable=4, max_num_seqs=2)
    server.add("a", prompt=8, max_tokens=6)
    second = server.add("b", prompt=8, max_tokens=6)
    third, urgent = server.request("c", prompt=1), server.request("d", prompt=1, priority=-1)
    server.step()
    server.scheduler.add(third)
    plan = server.scheduler.schedule()
    assert plan.preempted == (second,)
    assert server.scheduler.waiting == [second, third]
    server.scheduler.add(urgent)
    assert server.scheduler.waiting == [urgent, second, third]
    server.commit(plan)


def test_P4_an_urgent_request_takes_the_seat_of_a_lower_one(bench):
    server = bench(max_num_seqs=2)
    low, normal = server.add("low", priority=1), server.add("normal")
    server.step()
    server.add("urgent", prompt=5, priority=-1)
    plan = server.scheduler.schedule()
    assert plan.preempted == (low,)
    assert [item.request.id for item in plan.scheduled] == ["normal", "urgent"]
    assert plan.num_tokens == 1 + 5, "the victim's share went back to the budget"
    assert normal.status is Status.RUNNING
    server.commit(plan)


def test_P4_an_equal_never_takes_a_seat(bench):
    server = bench(max_num_seqs=1)
    server.add("a")
    server.step()
    server.add("b")
    assert server.step() == {"a": 1}


def test_P5_a_late_output_is_dropped_exactly_once(bench):
    server = bench()
    gone, stays = server.add("gone"), server.add("stays")
    plan = server.scheduler.schedule()
    assert server.scheduler.abort("gone") is gone
    assert server.commit(plan) == [stays]
    assert (gone.output_token_ids, gone.finish_reason) == ([], "abort")
    with pytest.raises(RuntimeError, match="launched step, once"):
        server.commit(plan)


def test_P5_a_new_request_may_take_the_id_of_one_aborted_in_flight(bench):
    server = bench()
    server.add("a")
    plan = server.scheduler.schedule()
    server.scheduler.abort("a")
    successor = server.add("a")
    assert server.commit(plan) == []
    assert (successor.output_token_ids, successor.status) == ([], Status.WAITING)
    server.drain()
    assert successor.num_output_tokens == 3


def test_P5_a_request_that_failed_needs_no_token(bench):
    server = bench()
    server.add("broken")
    fine = server.add("fine")
    plan = server.scheduler.schedule()
    server.scheduler.abort("broken")
    assert server.scheduler.commit(plan, {"fine": 7}) == [fine]


def test_P6_only_the_last_chunk_samples(bench):
    server = bench(max_num_seqs=1, max_num_batched_tokens=4)
    request = server.add("a", prompt=9, max_tokens=1)
    flags = []
    while server.scheduler.requests:
        plan = server.scheduler.schedule()
        flags += [item.samples for item in plan.scheduled]
        advanced = server.commit(plan)
        assert advanced == ([request] if flags[-1] else [])
    assert flags == [False, False, True]
    assert request.num_output_tokens == 1


def test_P7_decodes_go_on_in_every_step_of_a_long_prefill(bench):
    server = bench(usable=64, max_num_seqs=4, max_num_batched_tokens=4)
    for name in "abc":
        server.add(name, prompt=1, max_tokens=40)
    server.step()
    server.add("long", prompt=20, max_tokens=1)
    for _ in range(20):
        assert server.step() == {"a": 1, "b": 1, "c": 1, "long": 1}


def test_P8_one_token_and_the_full_context_are_served_and_one_more_is_refused(bench):
    server = bench(max_model_len=8)
    one, full = server.add("one", prompt=1, max_tokens=1), server.add("full", prompt=4, max_tokens=4)
    server.drain()
    assert (one.num_output_tokens, full.num_output_tokens) == (1, 4)
    with pytest.raises(RequestError, match=r"prompt \(4\) \+ max_tokens \(5\) must not exceed max_model_len \(8\)"):
        server.add("more", prompt=4, max_tokens=5)
    with pytest.raises(RequestError, match=r"prompt \(8\)") as caught:
        server.add("long", prompt=8, max_tokens=None)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(("max_model_len", "expected"), [(8, 5), (None, 14)])
def test_P8_without_max_tokens_a_request_goes_to_the_end_of_the_context(bench, max_model_len, expected):
    server = bench(usable=4, max_model_len=max_model_len)
    request = server.add("a", prompt=3, max_tokens=None)
    server.drain()
    assert (request.num_output_tokens, request.finish_reason) == (expected, "length")


def test_P8_min_tokens_that_the_context_can_not_hold_are_refused(bench):
    with pytest.raises(RequestError, match=r"max_model_len \(8\)"):
        bench(max_model_len=8).add("a", prompt=3, max_tokens=None, min_tokens=6)


def test_P8_an_empty_prompt_and_a_live_id_are_refused(bench):
    server = bench()
    with pytest.raises(RequestError, match="at least one token") as caught:
        server.add("a", prompt=[])
    assert caught.value.param == "prompt"
    server.add("a")
    with pytest.raises(RequestError, match=r"request_id \('a'\)"):
        server.add("a")


@pytest.mark.parametrize(
    ("usable", "config"),
    [
        (16, {"max_num_seqs": 2, "max_num_batched_tokens": 2}),
        (16, {"max_num_seqs": 1}),
        (16, {"block_size": 64}),
        (2, {"max_num_seqs": 3}),
        (1, {"block_size": 8, "max_num_seqs": 3}),
    ],
)
def test_P9_the_smallest_limits_work(bench, usable, config):
    server = bench(usable=usable, **config)
    requests = [server.add(name, prompt=5, max_tokens=3) for name in "abcd"]
    server.drain()
    assert [request.output_token_ids for request in requests] == [[7, 7, 7]] * 4


def test_P10_first_come_first_served_within_a_priority(bench):
    server = bench(max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0), ("e", -1)):
        server.add(name, max_tokens=1, priority=priority)
    order = [name for _ in range(5) for name in server.step()]
    assert order == ["e", "b", "d", "a", "c"]


def test_P10_nobody_overtakes_a_head_that_does_not_fit(bench):
    server = bench(usable=4)
    server.add("a", prompt=8, max_tokens=4)
    server.step()
    server.add("big", prompt=8, max_tokens=4)
    server.add("small", prompt=1, max_tokens=1)
    assert server.step() == {"a": 1}


def test_P10_a_full_queue_refuses_a_group_as_a_whole(bench):
    server = bench(max_waiting=3)
    server.add("a")
    group = [server.request(name) for name in "bcd"]
    with pytest.raises(QueueFullError, match=r"1 requests wait and 3 more would exceed max_waiting \(3\)"):
        server.scheduler.add(*group)
    assert list(server.scheduler.requests) == ["a"]
    server.scheduler.add(*group[:2])
    assert list(server.scheduler.requests) == ["a", "b", "c"]


def test_P10_a_request_past_its_time_in_the_queue_expires(bench):
    server = bench(max_num_seqs=1, queue_timeout=10.0)
    running = server.add("running", max_tokens=9)
    server.step()
    late = server.add("late")
    server.clock.now = 5.0
    later = server.add("later")
    server.clock.now = 10.0
    plan = server.scheduler.schedule()
    assert plan.expired == (late,)
    assert (late.finish_reason, late.status) == ("abort", Status.FINISHED)
    assert server.scheduler.waiting == [later]
    assert running.status is Status.RUNNING, "a started request has no deadline"
    server.commit(plan)


def test_choices_of_one_prompt_share_its_blocks(bench):
    server = bench(max_num_seqs=4, max_num_batched_tokens=8)
    prompt = list(range(8))
    server.scheduler.add(*[server.request(f"a/{i}", prompt, choice=i) for i in range(3)])
    assert server.step() == {"a/0": 8}
    assert server.step() == {"a/0": 1, "a/1": 4, "a/2": 3}, "the first block of both is a hit"


def test_counters_count_tokens_once_a_request(bench):
    server = bench(usable=4)
    prompt = server.add("a", prompt=5, max_tokens=8).prompt_token_ids
    other = server.add("b", prompt=5, max_tokens=8)
    server.drain()
    again = server.add("c", prompt, max_tokens=1)
    server.drain()
    stats = server.scheduler.stats()
    assert other.num_preemptions == stats.preemptions == 1
    assert stats.prefix_queries == 15, "resuming looks up again but does not count"
    assert (other.num_cached_tokens, again.num_cached_tokens, stats.prefix_hits) == (0, 4, 4)


def test_a_step_can_not_be_planned_over_a_launched_one(bench):
    server = bench()
    server.scheduler.schedule()
    with pytest.raises(RuntimeError, match="before commit"):
        server.scheduler.schedule()
