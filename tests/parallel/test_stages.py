"""The split of layers into stages: every layer once, in order, on the rank that computes it."""

import pytest

from turnout.parallel.stages import held, split


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("layers", [8, 9, 12, 61])
def test_stages_hold_every_layer_once_and_differ_by_one_with_embedding_and_head_counted(layers, stages):
    found = split(layers, stages)
    assert [layer for some in found for layer in some] == list(range(layers))
    load = [len(some) + (stage == 0) + (stage == stages - 1) for stage, some in enumerate(found)]
    assert min(map(len, found)) >= 1
    assert max(load) - min(load) <= 1


def test_as_many_stages_as_layers_hold_one_each():
    assert split(4, 4) == [range(i, i + 1) for i in range(4)]


def test_a_rank_holds_every_pp_th_stage():
    assert held(8, pp=2, virtual=2, rank=0) == {0: range(0, 2), 2: range(5, 7)}
    assert held(8, pp=2, virtual=2, rank=1) == {1: range(2, 5), 3: range(7, 8)}
    assert held(4, pp=2, virtual=1, rank=1) == {1: range(2, 4)}
