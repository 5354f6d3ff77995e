"""When a request ends: several end-of-sequence ids, stop tokens, min_tokens, ignore_eos, max_tokens."""

import pytest

from turnout.inference.core.request import Request
from turnout.inference.core.step import Scheduled

EOS = frozenset({1, 2})


@pytest.fixture
def request_with(bench):
    def make(**fields):
        return bench().add("a", max_tokens=4, eos_token_ids=EOS, **fields)

    return make


def sampling(request: Request) -> Scheduled:
    """The request's share of a step that samples its next token."""
    return Scheduled(request, request.num_tokens - 1, 1, [0], [1], samples=True)


@pytest.mark.parametrize("token", sorted(EOS))
def test_every_end_of_sequence_id_ends_it(request_with, token):
    request = request_with()
    assert request.append(7) is None
    assert request.append(token) == "stop"
    assert request.output_token_ids == [7, token]


def test_ignore_eos_goes_on_to_the_length(request_with):
    request = request_with(ignore_eos=True)
    assert [request.append(1) for _ in range(4)] == [None, None, None, "length"]


def test_stop_tokens_end_it_even_when_eos_is_ignored(request_with):
    request = request_with(ignore_eos=True, stop_token_ids=[9])
    assert request.append(9) == "stop"


def test_a_stop_token_as_the_last_one_allowed_is_a_stop(request_with):
    request = request_with()
    assert [request.append(token) for token in (7, 7, 7, 1)][-1] == "stop"


def test_min_tokens_suppresses_every_end_until_they_are_out(request_with):
    request = request_with(min_tokens=2, stop_token_ids=[9])
    for _ in range(2):
        assert sampling(request).suppressed_token_ids == {1, 2, 9}
        assert request.append(1) is None
    assert sampling(request).suppressed_token_ids == frozenset()
    assert request.append(9) == "stop"


def test_tokens_of_the_prompt_never_end_it(bench):
    request = bench().add("a", prompt=[1, 2, 1], eos_token_ids=EOS)
    assert request.append(7) is None
    assert (request.num_tokens, request.num_output_tokens) == (4, 1)
