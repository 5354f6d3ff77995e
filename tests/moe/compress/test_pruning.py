"""What stands around the methods: bad numbers, calibration that saw nothing, experts of their own rows."""

import copy
from dataclasses import replace

import pytest
import torch

from turnout import ConfigError, NonFiniteError
from turnout.moe import ModelConfig, MoEConfig, VarlenContext
from turnout.moe.compress.config import CompressConfig
from turnout.moe.compress.pruning import prune, prune_block
from turnout.moe.compress.scores import magnitude
from turnout.moe.compress.seen import Seen
from turnout.moe.compress.sparsity import Sparsity
from turnout.moe.compress.watch import places, watching
from turnout.moe.layers.block import Block

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


@pytest.fixture(scope="module")
def block():
    moe = MoEConfig(width=16, expert_width=24, num_experts=4, every=1, top_k=1, router="softmax", shared_experts=1)
    cfg = ModelConfig(
        vocab_size=64, width=16, layers=1, heads=4, kv_heads=2, head_dim=4, ffn_width=32, max_seq_len=64, moe=moe,
    )  # fmt: skip
    torch.manual_seed(0)
    return Block(cfg, 0).eval().requires_grad_(False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_every_matrix_of_a_block_is_pruned_and_every_expert_by_its_own_rows(block, method, pattern):
    new = copy.deepcopy(block)
    with watching(new, gram=True) as met:
        new(drawn(60, 16, seed=2), torch.arange(60), VarlenContext(torch.tensor([0, 60])))
    counts = [seen.count for seen in met["ffn.experts.w_in"]]
    least = sorted(counts)[2]  # so that two experts have too few
    how = CompressConfig(method=method, pattern=pattern, min_rows=least)
    notes = prune_block(new, met, how, {})
    strict = prune_block(copy.deepcopy(block), met, replace(how, min_rows=61), {})
    assert not any(name.startswith(("attention", "ffn.shared")) for name in strict["by_weights"])
    few = [e for e, count in enumerate(counts) if count < least]
    assert few
    decided = [] if method == "magnitude" else [f"{stack}[{e}]" for stack in met_stacks(met) for e in few]
    assert sorted(notes["by_weights"]) == sorted(decided)
    assert notes["zeros"] == 0.5
    lost = energy = 0.0
    before, after = dict(whole(block)), dict(whole(new))
    for name, w_FD in after.items():
        stack, _, number = name.rstrip("]").partition("[")
        rows, zeros = least if number else 1, Sparsity(span=pattern and 4)
        alone, made = prune(before[name], met[stack][int(number or 0)], zeros, method, name="w", min_rows=rows)
        assert torch.equal(w_FD, alone), name
        assert notes["by_weights"].get(name) == made.fallback
        lost, energy = lost + made.error, energy + made.energy
    assert notes["error"] == pytest.approx(lost / energy)
    changed = {name for name, w in new.named_parameters() if not torch.equal(w, block.get_parameter(name))}
    pruned = {name.partition("[")[0] for name in after}
    assert {name.removesuffix(".weight") for name in changed} == pruned
    assert {"attention.wq", "attention.wo", "ffn.shared.w_in", "ffn.experts.w_out"} <= pruned


def whole(block):
    return [(name, w_FD) for name, w_FD, *_ in places(block)]


def met_stacks(met):
    return [name for name in met if name.startswith("ffn.experts.")]


def test_matrices_of_a_block_can_have_shares_of_their_own(block):
    new, shares = copy.deepcopy(block), {"attention.wq": 0.25, "ffn.experts.w_out[2]": 1.0, "ffn.experts.w_in[0]": 0.0}
    notes = prune_block(new, {}, CompressConfig(method="magnitude", sparsity=0.5), shares)
    zeros = {name: float((w == 0).double().mean()) for name, w in whole(new)}
    assert zeros == {name: shares.get(name, 0.5) for name in zeros}
    assert notes["zeros"] == pytest.approx(sum(float((w == 0).sum()) for _, w in whole(new)) / size(new))
    assert notes["by_weights"] == {}


def size(block):
    return sum(w.numel() for _, w in whole(block))


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
