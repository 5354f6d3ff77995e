"""The module: what it computes, how it starts, and that it does nothing heavy when its package is imported."""

import subprocess
import sys

import pytest
import torch

from turnout import ConfigError
from turnout.moe.adaptive import AdaptiveMixture


def test_every_expert_is_its_own_linear_map():
    mixture = AdaptiveMixture(3, 2, 4, torch.Generator().manual_seed(0))
    x = torch.randn(5, 2)
    outputs, logits = mixture(x)
    assert outputs.shape == (5, 3, 4)
    for expert in range(3):
        want = torch.nn.functional.linear(x, mixture.weight_EOD[expert], mixture.bias_EO[expert])
        torch.testing.assert_close(outputs[:, expert], want)
    torch.testing.assert_close(logits, torch.nn.functional.linear(x, mixture.gate_ED, mixture.gate_bias_E))


def test_a_prediction_weighs_experts_by_the_gate():
    mixture = AdaptiveMixture(3, 2, 4, torch.Generator().manual_seed(0))
    x = torch.randn(5, 2)
    outputs, logits = mixture(x)
    want = sum(logits.softmax(-1)[:, [e]] * outputs[:, e] for e in range(3))
    torch.testing.assert_close(mixture.predict(x), want)


def test_experts_start_different_and_about_equally_chosen():
    mixture = AdaptiveMixture(4, 2, 4, torch.Generator().manual_seed(0))
    assert len({tuple(w.flatten().tolist()) for w in mixture.weight_EOD}) == 4
    gate = mixture(torch.randn(100, 2, generator=torch.Generator().manual_seed(1)))[1].softmax(-1)
    assert gate.mean(0).sub(0.25).abs().max() < 0.05


def test_a_generator_fixes_the_weights():
    def weights(seed):
        return AdaptiveMixture(4, 2, 4, torch.Generator().manual_seed(seed)).weight_EOD

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(
    ("field", "sizes"), [("num_experts", (0, 2, 4)), ("in_features", (4, 0, 4)), ("out_features", (4, 2, -1))]
)
def test_a_size_below_one_is_refused(field, sizes):
    with pytest.raises(ConfigError, match=field):
        AdaptiveMixture(*sizes)


def test_importing_the_package_loads_no_torch():
    code = """
import sys
import turnout.moe.adaptive as adaptive
assert "torch" not in sys.modules
assert all(callable(getattr(adaptive, name)) for name in adaptive.__all__ if not name.isupper())
assert "torch" in sys.modules and "matplotlib" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
