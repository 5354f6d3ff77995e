"""What deterministic steps cost is measured on steps of both kinds, with both sets of kernels."""

from turnout.inference.cost import deterministic_cost
from turnout.inference.run import runner


def test_both_ways_are_measured_and_said(model, monkeypatch):
    forms = []
    real = runner.using
    monkeypatch.setattr(runner, "using", lambda form: forms.append(form) or real(form))
    cost = deterministic_cost(model, prompt=24, batch=3, steps=4)
    assert set(forms) == {None, "invariant"}
    assert min(cost.fast.prefill, cost.fast.decode, cost.deterministic.prefill, cost.deterministic.decode) > 0
    lines = str(cost).splitlines()
    assert lines[0].startswith("prefill of 24 tokens")
    assert lines[1].startswith("decode of 3 requests")
