"""Sampling parameters are validated at birth; the error names the parameter."""

import math

import pytest

from turnout import RequestError, SamplingParams


def test_defaults_and_names_are_those_that_users_of_vllm_know():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)


def test_stops_are_kept_as_tuples():
    params = SamplingParams(stop="end", stop_token_ids=[3, 4])
    assert (params.stop, params.stop_token_ids) == (("end",), (3, 4))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 10**9),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", None),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "34"),
        ("ignore_eos", 1),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
        ("logprobs", 10**6),
    ],
)
def test_P8_a_bad_value_is_refused_by_name(field, value):  # noqa: N802
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    "edge",
    [{"max_tokens": 1}, {"max_tokens": None, "min_tokens": 99}, {"top_k": -1}, {"temperature": 0}, {"logprobs": 0}],
)
def test_the_edges_are_allowed(edge):
    SamplingParams(**edge)
