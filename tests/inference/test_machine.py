"""What a machine is put together from must be there: settings that ask for more are refused."""

import pytest

from turnout import ConfigError
from turnout.inference.machine import _skip_zeros
from turnout.tests.inference.conftest import build_model


def test_sparse_tensor_cores_are_refused_where_there_are_none(make_engine):
    with pytest.raises(ConfigError, match=r"semi_structured \(true\) needs a GPU, and the model is on cpu: use "):
        make_engine(semi_structured=True)


def test_divided_matrices_keep_their_zeros():
    with pytest.raises(ConfigError, match=r"semi_structured \(true\) needs whole matrices, and parallel\.tp \(2\)"):
        _skip_zeros(build_model(), 2)
