"""A server that can not start is an error that says why, not a wait."""

import pytest

from turnout import PeerError
from turnout.launch.server_process import serving


def test_a_server_without_a_model_fails_at_once_with_its_own_words(tmp_path):
    with pytest.raises(PeerError, match="exit code 6") as error, serving(tmp_path / "nothing", tmp_path):
        pytest.fail("it started")
    assert "holds no model" in str(error.value)
    assert str(tmp_path / "serve.log") in str(error.value)
