"""Every operation is measured in its forms, on inputs that it takes, at bytes and FLOPs that can be counted again."""

import pytest
import torch

from turnout import ConfigError, kernels
from turnout.kernels import registry
from turnout.launch.benches import cases as shapes
from turnout.launch.benches import maker
from turnout.launch.benches.kernels import check_names, measure
from turnout.launch.benches.maker import Maker
from turnout.launch.benches.moe import composed


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in {
        "MOST": 1 << 20, "ROWS": (1, 3), "D": 64, "F": 32, "VOCABULARY": 96, "E": 4, "HIDDEN": 64,
        "K": 2, "H": 4, "G": 2, "HEAD": 32, "CONTEXTS": (20,), "BATCHES": (1, 3), "PROMPTS": (7,),
        "SCALE": {"scale": 0.2},
    }.items():  # fmt: skip
        monkeypatch.setattr(shapes, name, value)
    monkeypatch.setattr(maker, "COLD", 1 << 12)


def test_every_operation_has_cases():
    """A new operation is measured from its first day: write its case into launch/benches/cases.py."""
    assert set(shapes.CASES) >= set(registry.FORMS)


@pytest.mark.parametrize("op", registry.FORMS)
def test_every_case_runs_in_all_its_forms_and_they_agree(op):
    for case in shapes.cases(op, Maker(torch.device("cpu"))):
        assert case.size > 0
        assert case.flops >= 0
        arguments = case.make()
        found = {}
        for form in ("reference", "torch", "cpp"):
            with registry.using(form):
                if registry.choose(op, *arguments[0], **case.keywords) == form:
                    found[form] = getattr(kernels, op)(*arguments[0], **case.keywords)
        assert "reference" in found
        for values in found.values():
            if isinstance(values, torch.Tensor) and values.is_floating_point():
                expected = found["reference"].float()
                near = 0.05 * max(float(expected.abs().max()), 1.0)
                torch.testing.assert_close(values.float(), expected, rtol=0.05, atol=near)


def test_rows_name_the_form_that_runs_unasked():
    rows = list(measure(ops=["rms_norm"], forms=["reference", "cpp"], rounds=1, huge=False))
    assert {row["form"] for row in rows} == {"reference", "cpp"}
    assert {row["shape"] for row in rows} == {"1 x 64", "64 x 64", "2048 x 64"}
    for shape in {row["shape"] for row in rows}:
        assert sum(row["unasked"] for row in rows if row["shape"] == shape) <= 1
    assert all(row["seconds"] > 0 and row["size"] > 0 for row in rows)


def test_weights_go_round_so_that_none_is_found_in_the_cache(monkeypatch):
    monkeypatch.setattr(maker, "COLD", 10 * 2 * 64 * 32)
    arguments = shapes.cases("linear", Maker(torch.device("cpu")))[0].make()
    assert len({w.data_ptr() for _, w in arguments}) == 10


@pytest.mark.parametrize("op", ["grouped_gemm", "moe_mlp", "quantized_moe_mlp"])
def test_few_rows_meet_other_experts_in_the_next_call(op, monkeypatch):
    monkeypatch.setattr(shapes, "E", 8)
    case = shapes.cases(op, Maker(torch.device("cpu")))[0]
    which = {str(arguments[2 if op == "grouped_gemm" else 1].tolist()) for arguments in case.make()}
    assert len(which) > 4


def test_what_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"ops .softmax. is no operation: use linear"):
        check_names(["softmax"], [])
    with pytest.raises(ConfigError, match=r"forms .rows"):
        check_names(["linear"], ["rows"])


def test_the_composition_is_the_operation():
    torch.manual_seed(0)
    x, w_in, w_out = torch.randn(5, 16), torch.randn(4, 16, 16) / 4, torch.randn(4, 8, 16) / 4
    ids, weights = torch.tensor([[0, 1], [2, 3], [3, 1], [1, 0], [2, 0]]), torch.rand(5, 2)
    expected = kernels.moe_mlp(x, ids, weights, None, w_in, w_out)
    torch.testing.assert_close(composed(x, ids, weights, w_in, w_out), expected)
