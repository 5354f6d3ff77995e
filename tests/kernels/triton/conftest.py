"""Every test here runs in the corrected interpreter."""

import pytest

from turnout.kernels.triton import interpreter


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    interpreter.apply()
