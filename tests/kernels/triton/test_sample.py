"""Drawing tokens in Triton: those of the reference, ties and borders included."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry

# temperature, top-k, top-p, min-p
WISHES = [
    (0, 0, 1, 0), (1, 0, 1, 0), (0.7, 5, 1, 0), (1.5, 0, 0.8, 0), (1, 0, 1, 0.05), (2, 9, 0.6, 0.01), (1, 1, 0.5, 0),
    (1, 10**6, 0.999, 0), (1e-3, 3, 0.9, 0), (1e12, 0, 1e-9, 0), (0.5, 33, 1, 0.3),
]  # fmt: skip


def draws(scores, wishes, seeds=None):
    """`sample_rows` with these wishes in turn, the rows' numbers as seeds, by the reference and by Triton."""
    rows = torch.arange(len(scores))
    temperature, top_k, top_p, min_p = zip(*(wishes[row % len(wishes)] for row in range(len(scores))), strict=True)
    floats = [torch.tensor(values, dtype=torch.float64) for values in (temperature, top_p, min_p)]
    keys = (rows * 977 if seeds is None else seeds, rows % 3, rows * 2**30)
    args = (scores, floats[0], torch.tensor(top_k), floats[1], floats[2], *keys)
    found = []
    for form in ("reference", "triton"):
        with kernels.using(form):
            assert registry.choose("sample_rows", *args) == form
            found.append(kernels.sample_rows(*args))
    return found


def test_the_tokens_are_the_references():
    wanted, found = draws(torch.randn(11, 40) * 2, WISHES)
    assert torch.equal(found, wanted)


def test_ties_go_to_the_lower_ids():
    scores = (torch.randn(22, 40) * 1.5).round()
    scores[::2, 30:] = -torch.inf
    scores[:3] = 0.0
    wanted, found = draws(scores, WISHES)
    assert torch.equal(found, wanted)


def test_the_number_is_that_of_seed_step_and_position():
    seeds = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    wanted, found = draws(torch.zeros(5, 3000), WISHES[1:2], seeds)
    assert torch.equal(found, wanted)
    assert len(set(found.tolist())) == 5


def test_a_row_that_is_not_finite_ends_and_spoils_no_other():
    scores = torch.randn(15, 30)
    scores[2, 3], scores[5, 7], scores[14] = torch.nan, torch.inf, -torch.inf
    wanted, found = draws(scores, WISHES)
    others = torch.ones(15, dtype=torch.bool)
    others[[2, 5, 14]] = False
    assert torch.equal(found[others], wanted[others])
    assert ((found >= 0) & (found < 30)).all()


@pytest.mark.full
@pytest.mark.parametrize("V", [1, 2, 17, 1024, 1025, 5000])
@pytest.mark.parametrize("kind", ["normal", "steep", "tied", "flat"])
def test_grid(kind, V):
    noise = torch.randn(2 * len(WISHES), V)
    scores = {"normal": noise * 2, "steep": noise * 30, "tied": noise.round(), "flat": noise * 0}[kind]
    wanted, found = draws(scores, WISHES)
    assert torch.equal(found, wanted)
