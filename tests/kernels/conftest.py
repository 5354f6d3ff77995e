"""Kernels run on poisoned memory: whatever an operation allocates and forgets to write is NaN."""

import os
from collections.abc import Iterator

import pytest
import torch

from turnout import kernels

# Interpreted and compiled kernels can not share a process: test_triton.py starts one for these.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "torch", "cpp", "rows"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each form in turn; forms that do not fit fall back, as they do for users."""
    with kernels.using(request.param):
        yield request.param
