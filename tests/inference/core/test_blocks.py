"""The block manager's invariants I1 to I10, each followed by hand. Blocks of 4 tokens."""
# ruff: noqa: N802 (I3 is the name of a rule)

import pytest

from turnout.inference.core.blocks import BlockManager
from turnout.inference.core.prefix import PrefixCache

PROMPT = list(range(100, 110))  # two full blocks and two tokens


def sets(blocks):
    """(free, idle, referenced) block ids."""
    referenced = {block for block, count in enumerate(blocks.counts) if count}
    return set(blocks.free), set(blocks.prefix.idle), referenced


def test_I1_every_block_is_in_one_set_and_counts_are_tables(bench):
    server = bench(usable=6)
    assert sets(server.blocks) == ({1, 2, 3, 4, 5, 6}, set(), set())
    first = server.add("a", PROMPT, max_tokens=9)
    server.step()
    second = server.add("b", PROMPT, max_tokens=9)
    server.step()
    assert first.block_table[:2] == second.block_table[:2]
    assert [server.blocks.counts[block] for block in first.block_table] == [2, 2, 1]
    free, idle, referenced = sets(server.blocks)
    assert (len(free), len(idle), len(referenced)) == (2, 0, 4)
    server.scheduler.abort("a")
    assert [server.blocks.counts[block] for block in second.block_table] == [1, 1, 1]


def test_I2_nothing_is_left_after_drain(bench):
    server = bench()
    for name in "abc":
        server.add(name, PROMPT)
    server.drain()
    assert sets(server.blocks)[2] == set()
    assert (server.scheduler.running, server.scheduler.waiting, server.scheduler.requests) == ([], [], {})


def test_I3_a_prefix_is_published_after_it_is_computed(bench):
    server = bench(max_num_seqs=2, max_num_batched_tokens=5)
    request = server.add("a", PROMPT)
    plan = server.scheduler.schedule()
    assert len(request.block_table) == 3
    assert server.blocks.prefix.block_of == {}, "allocated, launched, but not computed"
    server.commit(plan)
    assert set(server.blocks.prefix.hash_of) == {request.block_table[0]}, "5 of 10 tokens fill one block"
    server.step()
    assert set(server.blocks.prefix.hash_of) == set(request.block_table[:2])


def test_I3_an_aborted_step_publishes_nothing(bench):
    server = bench()
    server.add("a", PROMPT)
    plan = server.scheduler.schedule()
    server.scheduler.abort("a")
    server.commit(plan)
    assert server.blocks.prefix.block_of == {}


def test_I4_a_name_covers_the_whole_prefix_the_salt_and_the_model(bench):
    def names(prompt, salt="", fingerprint=b"model 1"):
        request = bench().request("a", prompt, cache_salt=salt)
        return PrefixCache(fingerprint).hashes(request, len(prompt) // 4, 4)

    base = names([1, 2, 3, 4, 5, 6, 7, 8])
    assert base == names([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert names([0, 2, 3, 4, 5, 6, 7, 8])[1] != base[1], "the parent"
    assert names([1, 2, 3, 4, 5, 6, 7, 0])[0] == base[0]
    assert names([1, 2, 3, 4, 5, 6, 7, 0])[1] != base[1], "the tokens"
    assert names([1, 2, 3, 4, 5, 6, 7, 8], salt="tenant")[0] != base[0]
    assert names([1, 2, 3, 4, 5, 6, 7, 8], fingerprint=b"model 2")[0] != base[0]


def test_I4_tokens_of_several_bytes_are_not_confused(bench):
    cache = PrefixCache(b"")
    one, other = (cache.hashes(bench().request("a", prompt), 1, 2) for prompt in ([1, 256], [257, 0]))
    assert one != other


def test_I4_another_salt_hits_nothing(bench):
    server = bench()
    server.add("a", PROMPT)
    server.drain()
    server.add("b", PROMPT, cache_salt="tenant")
    assert server.step() == {"b": 10}


@pytest.mark.parametrize(("length", "computed"), [(1, 1), (4, 4), (5, 1), (8, 4), (9, 1)])
def test_I5_a_full_hit_still_computes_a_token(bench, length, computed):
    server = bench()
    prompt = PROMPT[:length]
    server.add("a", prompt)
    server.drain()
    again = server.add("b", prompt)
    assert server.step() == {"b": computed}
    assert again.num_cached_tokens == length - computed


def test_I6_the_least_recently_used_goes_first_and_tails_before_heads(bench):
    server = bench(usable=6)
    tables = {}
    for name in ("a", "b"):
        request = server.add(name, prompt=9, max_tokens=1)
        plan = server.scheduler.schedule()
        tables[name] = list(request.block_table)
        server.commit(plan)
    assert len(server.blocks.free) == 2
    expected = [tables["a"][1], tables["a"][0], tables["b"][1], tables["b"][0]]
    assert list(server.blocks.prefix.idle) == expected
    server.add("c", prompt=13, max_tokens=1)
    server.drain()
    assert list(server.blocks.prefix.idle)[:2] == expected[2:], "two free blocks and two of a's were taken"


def test_I6_a_hit_makes_a_prefix_recent(bench):
    server = bench(usable=4)
    prompt = server.add("a", prompt=5, max_tokens=1).prompt_token_ids
    server.drain()
    server.add("b", prompt=5, max_tokens=1)
    server.drain()
    server.add("a again", prompt, max_tokens=1)
    server.drain()
    server.add("c", prompt=12, max_tokens=1)
    server.drain()
    server.add("a at last", prompt, max_tokens=1)
    assert server.step() == {"a at last": 1}, "b's block was evicted, not a's"


def test_I6_a_prefix_computed_twice_is_kept_once(bench):
    server = bench(usable=6)
    first, second = server.add("a", PROMPT), server.add("b", PROMPT)
    plan = server.scheduler.schedule()
    assert not set(first.block_table) & set(second.block_table), "side by side, nothing is published yet"
    server.commit(plan)
    assert first.block_table[:2] == second.block_table[:2]
    assert len(server.blocks.free) == 2


def test_I7_blocks_of_an_aborted_request_stay_until_its_step_is_over(bench):
    server = bench(usable=3)
    request = server.add("a", PROMPT, max_tokens=1)
    plan = server.scheduler.schedule()
    table = list(request.block_table)
    server.scheduler.abort("a")
    assert all(server.blocks.counts[block] == 1 for block in table)
    server.commit(plan)
    assert server.blocks.usage == 0


def test_I8_a_block_that_is_written_to_has_one_owner(bench):
    server = bench()
    requests = [server.add(name, PROMPT, max_tokens=9) for name in "abc"]
    server.step()
    server.step()
    partial = [request.block_table[-1] for request in requests]
    assert len(set(partial)) == 3
    assert {server.blocks.counts[block] for block in partial} == {1}


def test_I9_the_null_block_is_never_handed_out(bench):
    server = bench(usable=3)
    request = server.add("a", prompt=11, max_tokens=2)
    server.scheduler.schedule()
    assert sorted(request.block_table) == [1, 2, 3]
    assert server.blocks.counts[0] == 0


def test_I10_usage_is_referenced_over_usable(bench):
    server = bench(usable=6)
    assert server.scheduler.stats().usage == 0
    server.add("a", PROMPT)
    server.step()
    assert server.scheduler.stats().usage == 3 / 6
    server.drain()
    assert server.blocks.prefix.idle, "cached blocks do not count"
    assert server.scheduler.stats().usage == 0


def test_a_failed_call_changes_nothing(bench):
    blocks = BlockManager(3, 4)
    big, small = bench().request("a", PROMPT), bench().request("b", PROMPT[:8])
    assert not blocks.start(big)
    assert (big.block_table, len(blocks.free)) == ([], 2)
    assert blocks.start(small)
    small.token_ids.append(1)
    assert not blocks.extend(small)
    assert (len(small.block_table), blocks.num_available) == (2, 0)


def test_without_prefix_caching_nothing_is_shared(bench):
    server = bench(enable_prefix_caching=False)
    server.add("a", PROMPT)
    server.drain()
    server.add("b", PROMPT)
    assert server.step() == {"b": 10}
    assert server.blocks.prefix.block_of == {}
