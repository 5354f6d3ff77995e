"""What is noted of routings: sums over tokens are float64's within rounding, pages the reference's in every number."""

import itertools

import pytest
import torch

from turnout.kernels import store_routes, tally_routes
from turnout.kernels.cpp import build, routes
from turnout.kernels.reference import routes as reference

SHAPES = [(0, 4, 1), (1, 32, 4), (7, 33, 3), (64, 8, 8), (2, 300, 2)]
EXACT = [-5, -4, -1]  # dropped, T · K and T; between them sums of roundings


def routing(T, E, K, layers=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [5 * torch.randn(T, E, generator=generator) for _ in range(layers)]
    ids = [x.topk(K).indices.contiguous() for x in logits]
    wanted = [torch.rand(T, K, generator=generator) < 0.8 for _ in range(layers)]
    kept = [w & (torch.rand(T, K, generator=generator) < 0.8) for w in wanted]
    valid_T = torch.rand(T, generator=generator) < 0.7
    return logits, ids, wanted, kept, valid_T


@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
def test_sums_are_those_of_float64(T, E, K, sigmoid, masked):
    logits, ids, wanted, kept, valid_T = routing(T, E, K)
    valid_T = valid_T if masked else None
    if T > 1:
        logits[0][1] = torch.tensor([100.0] + [-torch.inf] * (E - 1))
    truth = torch.zeros(3, E + 5, dtype=torch.float64)
    reference.tally_routes(truth, [x.double() for x in logits], ids, wanted, kept, valid_T, sigmoid=sigmoid)
    if T > 1:
        truth[0, -2] = torch.inf  # of a row with infinities
    for run in (tally_routes, routes.tally_routes, reference.tally_routes):
        found = torch.ones(3, E + 5, dtype=torch.float64)
        with torch.inference_mode():
            run(found, logits, ids, wanted, kept, valid_T, sigmoid=sigmoid)
        found -= 1
        assert torch.equal(found[:, EXACT], truth[:, EXACT])
        assert torch.equal(found[:, :E], truth[:, :E])
        skip = slice(1, None) if T > 1 else slice(None)
        torch.testing.assert_close(found[skip], truth[skip], rtol=1e-5, atol=1e-5 * max(T, 1))
        assert torch.isfinite(found[0, -3]), "a share of 0 adds nothing"


def test_a_row_of_nan_shows_and_a_given_distribution_counts():
    logits, ids, wanted, kept, _ = routing(4, 8, 2)
    logits[1][2, 3] = torch.nan
    with torch.inference_mode():
        found = torch.zeros(3, 13, dtype=torch.float64)
        routes.tally_routes(found, logits, ids, wanted, kept)
        assert found[1, -3:-1].isnan().all()
        assert found[0].isfinite().all()
        found.zero_()
        even = [torch.full((4, 8), 1 / 8)] * 3
        assert not routes.tally_routes_fits(found, logits, ids, wanted, kept, shares=even)
        tally_routes(found, logits, ids, wanted, kept, shares=even)
    assert found[:, -3].allclose(4 * torch.tensor(8.0).log().double())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_pages_are_the_references(T, E, K, dtype):
    _, ids, _, kept, _ = routing(T, E, K)
    slots_T = torch.randperm(80)[:T]
    pages = [torch.full((80, 3, K), 77, dtype=dtype) for _ in range(2)]
    with torch.inference_mode():
        store_routes(pages[0], slots_T, ids, kept)
    reference.store_routes(pages[1], slots_T, ids, kept)
    assert torch.equal(*pages)


def test_a_slot_outside_is_refused_and_nothing_is_written():
    _, ids, _, kept, _ = routing(2, 8, 2)
    for slot in (-1, 5):
        pages = torch.full((5, 3, 2), 77, dtype=torch.int16)
        with pytest.raises(IndexError, match="within the 5 of the pages"):
            routes.store_routes(pages, torch.tensor([0, slot]), ids, kept)
        assert (pages == 77).all()


@pytest.mark.full
def test_every_instruction_set_and_any_number_of_threads_agree(monkeypatch):
    logits, ids, wanted, kept, valid_T = routing(300, 64, 4)
    found = []
    for (needed, flags), threads in itertools.product(build.INSTRUCTIONS, (1, 2)):
        if needed <= build._cpu():
            library = build.load(flags)
            monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda library=library: library)
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            sums = torch.zeros(3, 69, dtype=torch.float64)
            routes.tally_routes(sums, logits, ids, wanted, kept, valid_T)
            found.append(sums)
    for one, two in itertools.pairwise(found):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(found[i], found[i + 1]) for i in range(0, len(found), 2)), "threads"
