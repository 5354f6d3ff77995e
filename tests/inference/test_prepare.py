"""What is checked before the engine takes a request: ids of the vocabulary, and words as token sequences."""

import pytest

from turnout import RequestError, SamplingParams
from turnout.inference.prepare import spellings

from .test_engine import complete, tokens

PROMPT = list(range(5, 25))


@pytest.mark.parametrize(
    ("param", "params"),
    [
        ("stop_token_ids", {"stop_token_ids": [3, 321]}),
        ("logit_bias", {"logit_bias": {321: 1.0}}),
        ("bad_token_ids", {"bad_token_ids": [3, [4, 321]]}),
        ("allowed_token_ids", {"allowed_token_ids": [320, 321]}),
    ],
)
def test_O9_an_id_outside_the_vocabulary_is_refused_by_name(make_engine, param, params):  # noqa: N802
    engine = make_engine()
    with pytest.raises(RequestError, match=rf"{param} \(321\) must hold token ids from 0 to 320") as caught:
        engine.add_request("x", PROMPT, SamplingParams(**params))
    assert caught.value.param == param


def test_bad_words_that_leave_nothing_are_refused(make_engine, byte_level):
    (single,) = byte_level.encode("a")
    with pytest.raises(RequestError, match="allowed_token_ids"):
        make_engine().add_request("x", PROMPT, SamplingParams(bad_words=["a"], allowed_token_ids=[single]))


def test_a_word_is_spelled_where_a_text_begins_and_after_a_blank(byte_level):
    ids = {text: tuple(byte_level.encode(text)) for text in ("the", " the")}
    assert ids["the"] != ids[" the"]
    assert spellings("the", byte_level) == spellings(" the", byte_level) == set(ids.values())
    assert spellings(" ", byte_level) >= {tuple(byte_level.encode(" "))}


def test_bad_words_do_not_come(make_engine, byte_level):
    engine, params = make_engine(), {"temperature": 0, "max_tokens": 24}
    (free,) = complete(engine, [(PROMPT, SamplingParams(**params))])
    ids = tokens(free)[0]
    words = [byte_level.decode(ids[at : at + size]) for at, size in ((2, 1), (6, 2), (11, 3))]
    words = [word for word in words if word.strip() and "�" not in word]
    assert len(words) >= 2
    assert all(word in free.outputs[0].text for word in words)
    (clean,) = complete(engine, [(PROMPT, SamplingParams(**params, bad_words=words))])
    banned = [sequence for word in words for sequence in spellings(word, byte_level)]
    found = tokens(clean)[0]
    spans = {tuple(found[at : at + size]) for at in range(len(found)) for size in range(1, 9)}
    assert not spans & set(banned)
    assert found != ids


def test_a_request_that_comes_to_exclude_every_token_ends_alone_with_the_reason(make_engine):
    engine = make_engine()
    work = [
        (PROMPT, SamplingParams(temperature=0, max_tokens=6)),
        (PROMPT, SamplingParams(max_tokens=6, allowed_token_ids=[7], bad_token_ids=[[7, 7, 7]])),
    ]
    (expected,) = complete(engine, work[:1])
    healthy, dead = complete(engine, work)
    assert tokens(healthy) == tokens(expected)
    assert tokens(dead) == [[7, 7]]
    assert dead.outputs[0].finish_reason == "abort"
    assert isinstance(dead.error, RequestError)
    assert "excluded every token" in str(dead.error)
