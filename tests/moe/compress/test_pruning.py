"""What stands around the methods: bad numbers, calibration that saw nothing, experts of their own rows."""

import pytest
import torch

from turnout import ConfigError, NonFiniteError
from turnout.moe.compress.pruning import prune, prune_experts
from turnout.moe.compress.scores import magnitude
from turnout.moe.compress.seen import Seen
from turnout.moe.compress.sparsity import Sparsity

METHODS = ("magnitude", "wanda", "sparsegpt")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saw(x_TD):
    seen = Seen.nothing(x_TD.shape[1], gram=True)
    seen.add(x_TD)
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_an_error_with_the_matrix_name(method, bad):
    w, seen = drawn(4, 8), saw(drawn(20, 8, seed=1))
    w[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"blocks\.3\.wo has weights with NaN"):
        prune(w, seen, Sparsity(), method, name="blocks.3.wo")
    w[1, 2], seen.gram_DD[0, 0] = 0, bad
    with pytest.raises(NonFiniteError, match=r"blocks\.3\.wo has rows with NaN"):
        prune(w, seen, Sparsity(), method, name="blocks.3.wo")


@pytest.mark.parametrize("method", METHODS)
def test_calibration_that_saw_nothing_leaves_the_choice_to_magnitudes_and_says_so(method):
    w = drawn(4, 8)
    for seen, why in (
        (saw(torch.empty(0, 8)), "saw 0 rows, fewer than 1"),
        (saw(torch.zeros(9, 8)), "saw rows of zeros only"),
    ):
        new, made = prune(w, seen, Sparsity(span=4), method, name="w", min_rows=0)
        assert torch.equal(new, magnitude(w, Sparsity(span=4)))
        assert made.fallback == (None if method == "magnitude" else why)
        assert (made.error, made.energy) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_matrix_given_is_not_changed_and_a_zero_one_is_ordinary(method):
    w, seen = drawn(4, 8), saw(drawn(20, 8, seed=1))
    before = w.clone()
    prune(w, seen, Sparsity(), method, name="w")
    assert torch.equal(w, before)
    new, made = prune(torch.zeros(4, 8), seen, Sparsity(), method, name="w")
    assert not new.any()
    assert made.sparsity == 1


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_each_expert_is_pruned_by_its_own_rows_and_one_that_saw_few_is_named(method):
    w = drawn(3, 6, 16)
    seen = [saw(drawn(count, 16, seed=count) * torch.arange(16)) for count in (40, 5, 0)]
    stack, made = prune_experts(w, seen, Sparsity(), method, name="blocks.1.w_in", min_rows=8)
    alone, _ = prune(w[0], seen[0], Sparsity(), method, name="w")
    assert torch.equal(stack[0], alone)
    assert torch.equal(stack[1:], magnitude(w[1:], Sparsity()))
    assert [(one.name, one.fallback) for one in made] == [
        ("blocks.1.w_in[0]", None),
        ("blocks.1.w_in[1]", "saw 5 rows, fewer than 8"),
        ("blocks.1.w_in[2]", "saw 0 rows, fewer than 8"),
    ]


def test_a_span_that_does_not_divide_the_width_is_an_error_with_the_matrix_name():
    with pytest.raises(ConfigError, match=r"sparsity.span \(4\) must divide the input width of w \[4, 6\]"):
        prune(drawn(4, 6), saw(drawn(9, 6)), Sparsity(span=4), "magnitude", name="w")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.1}, r"sparsity.share \(1.1\) must lie in \[0, 1\]"),
        ({"share": -0.1}, r"sparsity.share \(-0.1\)"),
        ({"share": float("nan")}, r"sparsity.share \(nan\)"),
        ({"share": 0.4, "span": 4}, r"must be a whole number of 4 neighbours: use 2/4"),
        ({"share": 0.5, "span": 0}, r"sparsity.span \(0\) must be at least 1"),
    ],
)
def test_a_sparsity_that_can_not_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sparsity(**settings)
