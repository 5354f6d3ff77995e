"""Parallel sizes: what fits resolves, what does not is refused naming field, value, rule and fix; plans and shards."""

import math

import pytest
import torch

from turnout import ConfigError
from turnout.parallel.config import Layout, ParallelConfig
from turnout.parallel.mesh import ranks_along, through_nodes
from turnout.parallel.plan import match
from turnout.parallel.shard import ShardSpec


@pytest.mark.parametrize(
    ("sizes", "world", "layout"),
    [
        ({}, 1, Layout(dp=1, ep=1, edp=1)),
        ({}, 4, Layout(dp=4, ep=1, edp=4)),
        ({"ep": 2}, 4, Layout(dp=4, ep=2, edp=2)),
        ({"ep": 4, "dp": 4}, 4, Layout(dp=4, ep=4, edp=1)),
        ({"tp": 2, "ep": 4}, 8, Layout(dp=4, ep=4, edp=2, tp=2)),
        ({"tp": 2, "cp": 2, "pp": 2, "ep": 8}, 16, Layout(dp=2, ep=8, edp=1, tp=2, pp=2, cp=2)),
    ],
)
def test_sizes_resolve_against_the_world(sizes, world, layout):
    assert ParallelConfig(**sizes).resolve(world, num_experts=8) == layout


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        ({"dp": 3}, 2, r"parallel\.dp \(3\) must equal the number of ranks \(2\): use parallel\.dp=2 or start 3 ranks"),
        ({"ep": 3}, 4, r"parallel\.ep \(3\) must divide the data-parallel ranks \(4\): use 1, 2 or 4"),
        ({"tp": 3}, 4, r"parallel\.tp \(3\) must fit the ranks: .* divide their number \(4\)"),
        ({"pp": 2, "ep": 4}, 4, r"parallel\.ep \(4\) must divide the data-parallel ranks \(2\): use 1 or 2"),
        ({"chunks": 2}, 2, r"parallel\.chunks \(2\) is about rows that travel.*: use parallel\.ep=2 or more"),
        ({"exchange_rows": 9}, 2, r"parallel\.exchange_rows \(9\) is about rows that travel"),
        ({"exchange_rows": 3, "ep": 4}, 4, r"parallel\.exchange_rows \(3\) must be at least parallel\.ep \(4\)"),
        ({"ep": 6}, 6, r"parallel\.ep \(6\) must divide moe\.num_experts \(8\): use 1, 2, 4 or 8"),
    ],
)
def test_sizes_that_do_not_fit_the_world_are_refused(sizes, world, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**sizes).resolve(world, num_experts=8)


def test_every_rank_has_its_own_place_and_pipeline_ranks_are_outermost():
    layout = ParallelConfig(tp=2, cp=2, pp=2, ep=4).resolve(16)
    places = [layout.place(rank) for rank in range(16)]
    assert len({(p["pp"], p["dp"], p["cp"], p["tp"]) for p in places}) == 16
    assert len({(p["pp"], p["edp"], p["ep"]) for p in places}) == 16
    assert [p["pp"] for p in places] == [0] * 8 + [1] * 8
    assert [p["tp"] for p in places] == [0, 1] * 8
    assert ranks_along(layout, "ep")[0] == [0, 1, 2, 3]
    assert ranks_along(layout, "replicas")[0] == [0, 2, 4, 6]
    assert ranks_along(layout, "pp")[1] == [1, 9]


def test_nodes_are_neighbours_and_those_at_their_places():
    layout = ParallelConfig(tp=2, ep=4, pp=2).resolve(16)
    near, far = through_nodes(layout, 2)
    assert near[:2] == [[0, 1], [2, 3]]
    assert far[:2] == [[0, 2], [1, 3]]
    assert sorted(rank for group in far for rank in group) == list(range(16))


@pytest.mark.parametrize(("node", "expected"), [(None, None), (1, None), (2, 2), (4, None)])
def test_rows_go_through_nodes_where_there_are_several_of_several_ranks(node, expected):
    assert ParallelConfig(ep=4, node=node).exchange.node == expected


@pytest.mark.parametrize(
    "bad", [{"ep": 0}, {"dp": 0}, {"timeout": 0.0}, {"timeout": float("inf")}, {"virtual": 2}, {"node": 3, "ep": 4}]
)
def test_impossible_values_are_refused_at_birth(bad):
    with pytest.raises(ConfigError, match=rf"parallel\.{next(iter(bad))}"):
        ParallelConfig(**bad)


@pytest.mark.parametrize(("parts", "shape", "local"), [(1, (6, 4), (2, 4)), (2, (12, 5), (4, 5)), (2, (0,), (0,))])
def test_the_pieces_of_a_part_are_what_is_taken_of_the_whole(parts, shape, local):
    whole = torch.arange(math.prod(shape)).view(shape)
    offset = min(shape[0], 2)
    place = ShardSpec(shape, (offset,) + (0,) * (len(shape) - 1), parts=parts)
    pieces = [whole[piece] for piece in place.pieces(local)]
    assert len(pieces) == parts
    assert torch.equal(torch.cat(pieces), place.take(whole, local))


def test_the_first_matching_pattern_places_a_parameter_and_the_rest_is_replicated():
    plan = {"blocks.*.experts.w_in": "expert", "blocks.*": "column"}
    assert match(plan, "blocks.3.ffn.experts.w_in") == "expert"
    assert match(plan, "blocks.3.wq.weight") == "column"
    assert match(plan, "norm.weight") == "replicate"
    with pytest.raises(ConfigError, match="colum"):
        match({"*": "colum"}, "x")
