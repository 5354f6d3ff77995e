"""`compat=lenient`: what nobody knows is left out and named; all else is as strict as ever."""

import pytest

from turnout.inference.server.lenient import LONGEST, MOST, leave_out_unknown
from turnout.inference.server.protocol import ChatRequest

from .conftest import Running, run_server

PROMPT = {"prompt": "The list", "max_tokens": 2}
TALK = [{"role": "user", "content": "x", "mood": "good"}]


@pytest.fixture(scope="module")
def lenient(model, byte_level):
    with run_server(model, byte_level, {"compat": "lenient"}) as running:
        yield running


def test_unknown_fields_are_left_out_and_named(lenient: Running):
    plain = lenient.post(**PROMPT, temperature=0)
    answer = lenient.post(**PROMPT, temperature=0, beam_width=4, hints={"a": 1})
    assert answer.status_code == 200
    assert answer.json()["choices"] == plain.json()["choices"]
    assert answer.headers["warning"] == '299 turnout "ignored: beam_width, hints"'
    assert "warning" not in plain.headers


def test_streams_and_the_tokenizer_say_so_too(lenient: Running):
    stream = lenient.post(**PROMPT, stream=True, stream_options={"include_usage": True, "colour": 1})
    assert stream.headers["warning"] == '299 turnout "ignored: stream_options.colour"'
    assert stream.text.endswith("data: [DONE]\n\n")
    found = lenient.http.post("/tokenize", json={"prompt": "x", "why": 1})
    assert (found.status_code, found.headers["warning"]) == (200, '299 turnout "ignored: why"')


def test_they_are_found_within_messages():
    data = {"model": "tiny", "messages": [dict(TALK[0])], "top": 1, "n": 1}
    names = leave_out_unknown(ChatRequest, data)
    assert [name.rpartition(".")[2] for name in names] == ["mood", "top"]
    assert data == {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 1}


@pytest.mark.parametrize("wrong", [{"temperature": 3}, {"suffix": "end"}, {"n": True}, {"guided_json": "{}"}])
def test_what_is_known_is_as_strict_as_ever(lenient: Running, wrong):
    answer = lenient.post(**PROMPT, **wrong, beam_width=4)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(wrong))


def test_names_can_not_break_the_header_and_are_few(lenient: Running):
    names = ["a\r\nset-cookie: b", "é\n", "x" * 1000, *(f"field{i}" for i in range(MOST))]
    answer = lenient.post(**PROMPT, **dict.fromkeys(names, 1))
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    said = answer.headers["warning"]
    assert said.startswith('299 turnout "ignored: a??set-cookie??b, ??, ' + "x" * LONGEST + ", field0")
    assert said.endswith(' and 3 more"')


def test_the_usual_server_refuses_them(served: Running):
    assert served.post(**PROMPT, beam_width=4).json()["error"]["code"] == "unknown_parameter"
