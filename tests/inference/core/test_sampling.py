"""Sampling parameters are validated at birth; the error names the parameter."""

import math
from dataclasses import replace

import pytest

from turnout import RequestError, SamplingParams
from turnout.inference.core.request import Request


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
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 1e30),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", True),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 0}),
        ("logit_bias", {"1": 0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: None}),
        ("bad_words", "text"),
        ("bad_words", [""]),
        ("bad_words", [4]),
        ("bad_token_ids", 4),
        ("bad_token_ids", [-4]),
        ("bad_token_ids", [[]]),
        ("bad_token_ids", [[1, "2"]]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [1.5]),
        ("allowed_token_ids", 4),
    ],
)
def test_P8_a_bad_value_is_refused_by_name(field, value):  # noqa: N802
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    "edge",
    [
        {"max_tokens": 1},
        {"max_tokens": None, "min_tokens": 99},
        {"max_tokens": 5, "min_tokens": 5},
        {"top_k": -1},
        {"temperature": 0},
        {"logprobs": 0},
        {"min_p": 1},
        {"repetition_penalty": 0.01},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {0: 100, 5: -100}},
        {"logit_bias": {}},
        {"allowed_token_ids": [0]},
    ],
)
def test_the_edges_are_allowed(edge):
    SamplingParams(**edge)


def test_P8_no_tokens_are_generated_only_to_score_the_prompt():  # noqa: N802
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0
    with pytest.raises(RequestError, match=r"max_tokens \(0\).*prompt_logprobs"):
        SamplingParams(max_tokens=0)
    with pytest.raises(RequestError, match=r"min_tokens \(1\) must not exceed max_tokens \(0\)"):
        SamplingParams(max_tokens=0, prompt_logprobs=0, min_tokens=1)


def test_what_may_come_is_kept_in_one_form_that_can_be_given_again():
    params = SamplingParams(bad_token_ids=[4, [5, 6]], bad_words=["a"], allowed_token_ids=[1], logit_bias={2: 3})
    assert (params.bad_token_ids, params.bad_words) == (((4,), (5, 6)), ("a",))
    assert (params.allowed_token_ids, params.logit_bias) == ((1,), {2: 3})
    assert replace(params, n=1) == params


def test_allowed_and_bad_tokens_must_leave_one():
    with pytest.raises(RequestError, match=r"allowed_token_ids \(\[4, 5\]\).*bad_token_ids"):
        SamplingParams(allowed_token_ids=[4, 5], bad_token_ids=[5, 4])
    SamplingParams(allowed_token_ids=[4, 5], bad_token_ids=[4, [5, 5]])


def test_O6_no_step_is_planned_ahead_of_a_token_whose_value_matters(bench):  # noqa: N802
    asks = [{}, {"min_p": 0.5, "logit_bias": {1: 2}, "bad_token_ids": [4]}, {"bad_token_ids": [[4, 5]]}]
    asks += [{"repetition_penalty": 1.1}, {"presence_penalty": 1}, {"frequency_penalty": -1}, {"bad_words": ["a"]}]
    ahead = []
    for params in asks:
        scheduler = bench().scheduler
        scheduler.add(Request("x", [1, 2, 3], SamplingParams(**params)))
        scheduler.schedule()
        ahead.append(scheduler.schedule_ahead() is not None)
    assert ahead == [True] * 2 + [False] * 5


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.1}, {"presence_penalty": 0.5}, {"frequency_penalty": -0.5}, {"logit_bias": {3: 1.0}},
        {"bad_token_ids": [3]}, {"allowed_token_ids": [3]}, {"min_tokens": 1},
    ],
)  # fmt: skip
def test_whoever_changes_logits_says_so(asked):
    assert SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, logprobs=3, stop="x").leaves_logits
    assert not SamplingParams(**asked).leaves_logits
