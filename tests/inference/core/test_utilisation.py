"""How much of what is reserved is filled, against counts by hand. Blocks of 4 tokens."""

import pytest

from turnout.inference.core.blocks import BlockManager, ContiguousBlocks
from turnout.inference.core.gauge import TimeMean


def utilisation(server):
    return server.scheduler.stats().kv_utilisation


def test_idle_is_0_and_a_lone_request_is_tokens_over_slots(bench):
    server = bench()
    assert utilisation(server) == 0
    server.add("a", 5, max_tokens=3)
    server.step()
    assert utilisation(server) == 5 / 8
    server.step()
    assert utilisation(server) == 6 / 8
    server.drain()
    assert utilisation(server) == 0


def test_a_shared_block_counts_once(bench):
    server, prompt = bench(), list(range(100, 110))
    for name in "ab":
        server.add(name, prompt, max_tokens=9)
        server.step()
    assert server.scheduler.blocks.counts.count(2) == 2
    assert utilisation(server) == (8 + 3 + 2) / 16, "two full blocks for both, then three tokens and two"


def test_the_blocks_of_a_request_that_finished_in_flight_count(bench):
    server = bench()
    server.add("a", 5, max_tokens=9)
    server.step()
    plan = server.scheduler.schedule()
    server.scheduler.abort("a")
    assert utilisation(server) == 5 / 8
    server.commit(plan)
    assert utilisation(server) == 0


def test_a_window_holds_what_it_sees(bench):
    server = bench()
    server.blocks = server.scheduler.blocks = BlockManager(17, 4, window=4)
    server.add("a", 13, max_tokens=3)
    server.step()
    assert utilisation(server) == (13 - 8) / 8, "two of four blocks have been given back"


def test_an_encoders_memory_counts_once(bench):
    server = bench(max_num_seqs=2)
    for name in "ab":
        server.add(name, [1], max_tokens=4, encoder_token_ids=[7] * 6)
    server.step()
    assert utilisation(server) == (6 + 1 + 1) / 16, "two blocks of memory for both, one of each"


def test_contiguous_reserves_whole_runs_side_by_side_and_never_preempts(bench):
    server = bench(max_num_seqs=3, max_model_len=10)
    server.blocks = server.scheduler.blocks = ContiguousBlocks(12, 4, longest=10)
    requests = [server.add(name, prompt, max_tokens=4) for name, prompt in (("a", 3), ("b", 5), ("c", 6), ("d", 2))]
    counts = [0, 0, 0, 0]
    while server.scheduler.requests:
        plan = server.scheduler.schedule()
        for item in plan.scheduled:
            first = item.block_table[0]
            assert list(item.block_table) == [first, first + 1, first + 2], "one run"
            counts[requests.index(item.request)] = item.start + item.count
        server.commit(plan)
        running = [r for r in requests if r in server.scheduler.running]
        filled = sum(counts[requests.index(r)] for r in running)
        assert utilisation(server) == pytest.approx(filled / (12 * len(running)) if running else 0)
    stats = server.scheduler.stats()
    assert (stats.preemptions, stats.usage) == (0, 0)
    assert [len(r.output_token_ids) for r in requests] == [4] * 4


def test_the_mean_weighs_by_time_and_leaves_idle_out():
    gauge = TimeMean()
    for value, now in ((0.0, 5.0), (0.5, 10.0), (1.0, 12.0), (0.0, 13.0), (0.25, 50.0), (0.0, 51.0)):
        gauge.note(value, now)
    assert gauge.mean == (0.5 * 2 + 1.0 * 1 + 0.25 * 1) / 4
    assert TimeMean().mean == 0
