"""The MoE layer is measured beside others, on one routing for all; experts that do not fit are left out or refused."""

import pytest
import torch

from turnout import ConfigError, kernels
from turnout.launch.benches import moe
from turnout.launch.benches.maker import Maker

TINY = moe.Shape(width=64, hidden=32, experts=6, top_k=2)


def test_memory_limits_the_experts_that_are_resident():
    whole = moe.SHAPES["qwen3-30b-a3b"]
    assert whole.bytes_per_expert == 9_437_184
    assert moe.resident("qwen3-30b-a3b", None, 10**12) == whole
    assert moe.resident("qwen3-30b-a3b", 64, 10**12).experts == 64
    some = moe.resident("qwen3-30b-a3b", None, 4 * 10**9)
    assert some.experts * whole.bytes_per_expert <= 4 * 10**9 * moe.SHARE < (some.experts + 1) * whole.bytes_per_expert
    with pytest.raises(ConfigError, match=r"leaves 0 of the 2 experts of a token: 3.5 GB are needed"):
        moe.resident("mixtral", None, 10**9)
    with pytest.raises(ConfigError, match=r"shape .gpt-5. is no shape: use qwen3-30b-a3b"):
        moe.resident("gpt-5", None, 10**9)


@pytest.mark.parametrize("routing", moe.ROUTINGS)
def test_a_row_takes_different_experts_however_it_is_routed(routing):
    ids, weights = moe._draw(Maker(torch.device("cpu")), 40, TINY, routing)
    assert ids.shape == weights.shape == (40, 2)
    assert bool((ids[:, 0] != ids[:, 1]).all())
    assert (len(ids.unique()) == 2) == (routing == "one")
    assert bool((ids.max() < 6) & (ids.min() >= 0))


def test_ours_and_theirs_compute_the_same_and_are_timed_side_by_side():
    rows = moe.measure(TINY, tokens=(1, 5), routing="zipf", rounds=1, huge=False)
    timed = [row for row in rows if "seconds" in row]
    forms = {row["form"] for row in timed}
    assert forms >= {"reference", "composed", "transformers eager", "transformers grouped_mm"}
    assert [row["tokens"] for row in timed] == [1] * len(forms) + [5] * len(forms)
    assert {row["form"]: row["note"] for row in rows if "note" in row} == {
        name: "not installed" for name in moe.PEERS if name not in forms
    }
    maker = Maker(torch.device("cpu"))
    w_in, w_out = torch.randn(6, 64, 64).bfloat16() / 8, torch.randn(6, 32, 64).bfloat16() / 8
    x, (ids, weights) = maker.rows(5, 64), moe._draw(maker, 5, TINY, "uniform")
    expected = kernels.moe_mlp(x, ids, weights, None, w_in, w_out)
    for kind in ("eager", "grouped_mm"):
        layer = moe.transformers(kind, w_in, w_out, huge=False)
        torch.testing.assert_close(layer(x, ids, weights), expected, rtol=0.05, atol=0.05)


def test_a_form_may_be_measured_alone():
    rows = moe.measure(TINY, tokens=(2,), routing="one", rounds=1, huge=False, forms=("composed",))
    assert [row["form"] for row in rows] == ["composed"]
    assert rows[0]["experts met"] == 2
