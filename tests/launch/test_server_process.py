"""A server that can not start is an error that says why, not a wait."""

import socket

import pytest

from turnout import PeerError
from turnout.launch.server_process import free_port, serving


def test_a_server_without_a_model_fails_at_once_with_its_own_words(tmp_path):
    log = tmp_path / "serve.log"
    with pytest.raises(PeerError, match="exit code 6") as error, serving(tmp_path / "nothing", log):
        pytest.fail("it started")
    assert "holds no model" in str(error.value)
    assert str(log) in str(error.value)


def test_a_free_port_can_be_bound():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
