"""Who holds which tokens: every one exactly once, as much causal attention on every context rank."""

import dataclasses

import pytest
import torch

from turnout.parallel.config import Layout
from turnout.parallel.context import pieces
from turnout.parallel.mesh import Mesh
from turnout.parallel.spread import Spread

LAYOUTS = [(1, 2), (2, 1), (2, 2), (4, 1), (3, 2)]


def row(cp, tp, tokens):
    """The division of a row's tokens, as each of its ranks sees it."""
    layout = Layout(dp=1, ep=1, edp=cp * tp, cp=cp, tp=tp)
    alone = Mesh.alone(torch.device("cpu"))
    meshes = [
        dataclasses.replace(alone, rank=rank, world=cp * tp, layout=layout, place=layout.place(rank))
        for rank in range(cp * tp)
    ]
    return [Spread.of(mesh, tokens) for mesh in meshes]


@pytest.mark.parametrize(("cp", "tp"), LAYOUTS)
def test_every_token_is_held_once_and_the_order_finds_it(cp, tp):
    spreads = row(cp, tp, 24)
    held = torch.cat([spread.own_T for spread in spreads])
    assert all(len(spread.own_T) == 24 // (cp * tp) for spread in spreads)
    for spread in spreads:
        assert held[spread.order_W].tolist() == list(range(24))
        assert spread.own_T.tolist() == sorted(spread.own_T.tolist())
    for first in range(0, cp * tp, tp):  # the tensor ranks of a context rank hold what it attends
        together = torch.cat([spread.own_T for spread in spreads[first : first + tp]])
        assert all(torch.equal(together, spread.attended_A) for spread in spreads[first : first + tp])


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_causal_attention_of_one_document_is_the_same_work_on_every_rank(cp):
    work = set()
    for spread in row(cp, 1, 24):
        work.add(int((spread.attended_A + 1).sum()))
    assert len(work) == 1


def attended(spread, borders, window):
    """Which (query, key) pairs the pieces let attention compute, as token numbers."""
    pairs = set()
    for piece in pieces(torch.tensor(borders), spread, window):
        queries, keys = spread.attended_A[piece.queries].tolist(), list(range(piece.keys.start, piece.keys.stop))
        spans = zip(piece.cu_q_B1.tolist(), piece.cu_q_B1.tolist()[1:], strict=False)
        others = zip(piece.cu_k_B1.tolist(), piece.cu_k_B1.tolist()[1:], strict=False)
        for (q, q_end), (k, k_end) in zip(spans, others, strict=True):
            assert queries[q:q_end] == keys[k:k_end][len(keys[k:k_end]) - (q_end - q) :], "queries are the last keys"
            pairs |= {(i, j) for i in queries[q:q_end] for j in keys[k:k_end] if i - (window or 99) < j <= i}
    return pairs


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("borders", [[0, 24], [0, 1, 7, 11, 12, 24], [0, 6, 6, 18, 24], list(range(25))], ids=str)
@pytest.mark.parametrize("cp", [2, 3])
def test_the_pieces_cover_each_documents_causal_pairs_and_no_others(cp, borders, window):
    found = [attended(spread, borders, window) for spread in row(cp, 1, 24)]
    document = torch.bucketize(torch.arange(24), torch.tensor(borders), right=True).tolist()
    wanted = {
        (query, key)
        for query in range(24)
        for key in range(query + 1)
        if document[query] == document[key] and query - key < (window or 99)
    }
    assert set().union(*found) == wanted
    assert sum(map(len, found)) == len(wanted)


def test_a_window_leaves_out_the_keys_before_it():
    (spread, _) = row(2, 1, 24)
    first, last = pieces(torch.tensor([0, 24]), spread, 3)
    assert (first.keys, last.keys) == (slice(0, 6), slice(16, 24))


@pytest.mark.parametrize(("cp", "tp"), LAYOUTS)
def test_tokens_that_do_not_divide_are_refused(cp, tp):
    with pytest.raises(AssertionError, match="can not be divided"):
        row(cp, tp, Layout(dp=1, ep=1, edp=1, cp=cp, tp=tp).pieces + 1)
