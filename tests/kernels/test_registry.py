"""Which form runs, and what importing costs."""

import inspect
import subprocess
import sys
import threading

import pytest
import torch

from turnout import ConfigError, kernels
from turnout.kernels import registry

# with a gradient, for which no form of ours is the faster one
ALIGNED = (torch.randn(4, 8).requires_grad_(), torch.randn(2, 8, 8), torch.tensor([1, 4], dtype=torch.int32))


def test_library_form_runs_by_default_where_it_fits():
    assert registry.choose("grouped_gemm", *ALIGNED) == "torch"
    assert registry.choose("rms_norm", torch.ones(1, 4).double(), torch.ones(4).double(), 1e-5) == "reference"


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(4, 7), torch.randn(2, 7, 8), ALIGNED[2]),
        (torch.randn(4, 8), torch.randn(2, 8, 7), ALIGNED[2]),
        (torch.randn(4, 8), torch.randn(2, 8, 16)[..., ::2], ALIGNED[2]),
        (torch.randn(4, 8).double(), torch.randn(2, 8, 8).double(), ALIGNED[2]),
        (torch.randn(33)[1:].view(4, 8), ALIGNED[1], ALIGNED[2]),
        (ALIGNED[0], torch.randn(129)[1:].view(2, 8, 8), ALIGNED[2]),
    ],
    ids=["odd depth", "odd width", "strided weights", "float64", "unaligned rows", "unaligned weights"],
)
def test_reference_runs_where_the_library_has_limits(arguments):
    with kernels.using("torch"):
        assert registry.choose("grouped_gemm", *arguments) == "reference"


def test_override_holds_within_its_block_and_nests():
    with kernels.using("reference"):
        assert registry.choose("grouped_gemm", *ALIGNED) == "reference"
        with kernels.using("torch"):
            assert registry.choose("grouped_gemm", *ALIGNED) == "torch"
        assert registry.choose("grouped_gemm", *ALIGNED) == "reference"
    assert registry.choose("grouped_gemm", *ALIGNED) == "torch"


def test_override_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), kernels.using("reference"):
        _ = 1 / 0
    assert registry.choose("grouped_gemm", *ALIGNED) == "torch"


def test_override_stays_in_its_thread():
    seen = []
    with kernels.using("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.choose("grouped_gemm", *ALIGNED)))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_unknown_form_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'cuda'.*reference, torch, triton"), kernels.using("cuda"):
        pass


def test_triton_form_falls_back_on_a_machine_without_a_gpu():
    with kernels.using("triton"):
        assert registry.choose("grouped_gemm", *ALIGNED) == "torch"


def test_table_lists_every_public_operation_in_the_order_tried():
    table = kernels.table()
    public = set(dir(kernels)) - {"QuantizedWeight", "quantize_weight", "uniform", "normal", "using", "table"}
    assert set(table) == public
    assert list(table["grouped_gemm"]) == ["cpp", "torch", "reference"]
    with kernels.using("triton"):
        assert list(kernels.table()["grouped_gemm"]) == ["triton", "torch", "reference"]


def test_every_listed_form_exists_with_the_same_signature():
    for op, forms in registry.FORMS.items():
        public = inspect.signature(getattr(kernels, op))
        for form in forms:
            run, *predicates = registry._load(op, form)
            assert inspect.signature(run) == public, (op, form)
            for asks in predicates:
                assert asks is None or list(inspect.signature(asks).parameters) == list(public.parameters), (op, form)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [("import turnout.kernels", "torch"), ("from turnout.kernels import grouped_gemm", "triton")],
)
def test_importing_loads_nothing_before_it_is_needed(statement, absent):
    code = f"import sys; {statement}; sys.exit('{absent}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
