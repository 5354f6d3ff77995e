"""Blocks that a window has left are given back, in this order and no earlier. Blocks of 4 tokens."""
# ruff: noqa: N802 (I7 is the name of a rule)

import pytest

from turnout.inference.core.blocks import NULL, BlockManager


@pytest.fixture
def windowed(bench):
    """A scheduler whose model sees 6 tokens."""

    def make(usable=16, **config):
        server = bench(usable=usable, **config)
        server.blocks = server.scheduler.blocks = BlockManager(
            usable + 1, 4, enable_prefix_caching=server.config.enable_prefix_caching, window=6
        )
        return server

    return make


@pytest.mark.parametrize("caching", [True, False])
def test_I7_a_block_goes_when_no_later_token_sees_it(windowed, caching):
    """Token p sees p - 5 to p: the next one after c computed tokens sees c - 5 onwards."""
    server = windowed(enable_prefix_caching=caching)
    request = server.add("a", 3, max_tokens=20)
    while not request.finish_reason:
        server.step()
        computed = request.num_computed_tokens
        if request.block_table:
            held = [block for block in request.block_table if block != NULL]
            first = max((computed - 5) // 4, 0)  # the block of the oldest token that is still seen
            kept = min(first, max(computed // 4 - 1, 0))
            assert request.block_table[:kept] == [NULL] * kept
            assert len(held) == len(request.block_table) - kept
            assert server.blocks.num_usable - server.blocks.num_available == len(held)
    assert server.blocks.usage == 0


def test_I7_a_launched_step_still_has_what_it_reads(windowed):
    server = windowed()
    request = server.add("a", 9, max_tokens=9)
    server.step()
    plan = server.scheduler.schedule()
    ahead = server.scheduler.schedule_ahead()
    server.commit(plan)
    (item,) = ahead.scheduled
    seen = {at // 4 for at in range(item.start - 5, item.start + item.count)}
    assert all(request.block_table[i] == item.block_table[i] != NULL for i in seen)
    server.commit(ahead)


def test_what_was_published_stays_until_it_is_evicted(windowed):
    server = windowed(usable=8)
    prompt = list(range(100, 118))
    server.add("a", prompt, max_tokens=6)
    server.drain()
    assert len(server.blocks.prefix.idle) == 5, "18 + 5 computed tokens: all full blocks, those behind the window too"
    again = server.add("b", prompt, max_tokens=2)
    server.step()
    assert again.num_cached_tokens == 16
    server.drain()
    server.add("c", 30, max_tokens=2)  # takes all 8 blocks at its start
    server.drain()
    last = server.add("d", prompt, max_tokens=2)
    server.step()
    assert last.num_cached_tokens == 0, "a chain without its head is not found"
    server.drain()


def test_a_preempted_request_starts_with_a_whole_table_again(windowed):
    server = windowed(usable=5, enable_prefix_caching=False)
    first, second = server.add("a", 4, max_tokens=14), server.add("b", 4, max_tokens=14)
    server.drain()
    assert first.num_preemptions + second.num_preemptions > 0
    assert [len(r.output_token_ids) for r in (first, second)] == [14, 14]
    assert not any(server.blocks.counts)


def test_choices_do_not_take_over_a_table_with_gaps(windowed):
    server = windowed(max_num_seqs=1, enable_prefix_caching=False)
    parent = server.request("a", 9, max_tokens=12)
    child = server.request("b", parent.prompt_token_ids, max_tokens=2, parent=parent)
    server.scheduler.add(parent, child)
    server.step()
    server.step()
    assert parent.num_dropped_blocks > 0
    assert not server.blocks._parent(child)
    server.drain()
    assert child.finish_reason == "length"
