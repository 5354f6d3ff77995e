"""What the tests of several commands share."""

from pathlib import Path

import pytest

from turnout.tests.helpers.served_run import make_run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to be served, with room for requests that outlast what is done to them."""
    return make_run(tmp_path_factory.mktemp("runs") / "first", 8192)
