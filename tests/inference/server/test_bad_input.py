"""Every bad input gets an OpenAI error object and the right status, and the server goes on."""
# ruff: noqa: N802 (O9 is the name of a rule)

import json
import socket

import httpx
import openai
import pytest

from .conftest import NAME, Running

GOOD = {"model": NAME, "prompt": "The list", "max_tokens": 2}
JSON = {"Content-Type": "application/json"}


def check_error(answer: httpx.Response, status: int) -> dict:
    """The answer is an error of that status in OpenAI's shape, small and discreet."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) <= 4096
    assert "Traceback" not in answer.text
    assert "/work" not in answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def send(served: Running, body: bytes, **headers: str) -> httpx.Response:
    return served.http.post("/v1/completions", content=body, headers=JSON | headers)


def with_raw(field: str, raw: str) -> bytes:
    """The good body, with the JSON text `raw` as the field's value."""
    return (json.dumps(GOOD)[:-1] + f', "{field}": {raw}}}').encode()


BODIES = {
    "empty": b"",
    "truncated": json.dumps(GOOD).encode()[:-5],
    "trailing comma": json.dumps(GOOD).encode()[:-1] + b",}",
    "list": b"[]",
    "null": b"null",
    "number": b"1",
    "two values": b"{}{}",
    "invalid UTF-8": b'{"model": "\xff"}',
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "BOM": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "lone surrogate": json.dumps(GOOD | {"prompt": "a\ud800"}).encode(),
    "lone surrogate in a key": json.dumps(GOOD | {"\udfff": 1}).encode(),
    "duplicate key": b'{"model": "a", "model": "b"}',
    "duplicate key inside": with_raw("metadata", '{"a": 1, "a": 2}'),
    "NaN": with_raw("temperature", "NaN"),
    "Infinity": with_raw("temperature", "-Infinity"),
    "1e999": with_raw("temperature", "1e999"),
    "5,000 digits": with_raw("seed", "9" * 5000),
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_O9_a_body_that_is_not_strict_json_is_refused(served: Running, body):
    assert check_error(send(served, body), 400)["code"] == "invalid_json"


VALUES = [
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", -1),
    ("temperature", 3),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_k", 1.0),
    ("n", 0),
    ("n", True),
    ("n", 10**9),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", 10**30),
    ("max_tokens", "16"),
    ("min_tokens", -1),
    ("min_tokens", 3),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 10**4000),
    ("logprobs", 10**6),
    ("logprobs", -1),
    ("logprobs", True),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", "x" * 2**20),
    ("stop", 5),
    ("stop", [5]),
    ("stop_token_ids", [321]),
    ("stop_token_ids", "x"),
    ("min_p", 1.1),
    ("min_p", "0"),
    ("repetition_penalty", 0),
    ("repetition_penalty", 101),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("frequency_penalty", True),
    ("logit_bias", [5]),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": None}),
    ("logit_bias", {"321": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("bad_words", "word"),
    ("bad_words", [""]),
    ("bad_words", ["a"] * 257),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", [321]),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("echo", 1),
    ("priority", 0.5),
    ("cache_salt", ""),
    ("cache_salt", 5),
    ("stream", 1),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),
    ("ignore_eos", 0),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", ["a", ""]),
    ("prompt", ["a", [1]]),
    ("prompt", [1, "a"]),
    ("prompt", [1.0]),
    ("prompt", [True]),
    ("prompt", [-1]),
    ("prompt", [321]),
    ("prompt", [10**30]),
    ("prompt", {"a": 1}),
    ("prompt", ["a"] * 1025),
    ("prompt", None),
    ("model", 5),
    ("model", ""),
]


@pytest.mark.parametrize(("field", "value"), VALUES, ids=lambda v: str(v)[:30])
def test_O9_a_wrong_value_is_refused_naming_the_parameter(served: Running, field, value):
    error = check_error(send(served, json.dumps(GOOD | {field: value}).encode()), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"].split("[")[0].split(".")[0] == field
    assert error["message"].startswith(field)


def test_an_unknown_stream_option_is_refused(served: Running):
    body = GOOD | {"stream": True, "stream_options": {"include_everything": True}}
    assert check_error(send(served, json.dumps(body).encode()), 400)["param"] == "stream_options.include_everything"


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_parameter_is_named(served: Running, missing):
    body = {name: value for name, value in GOOD.items() if name != missing}
    error = check_error(send(served, json.dumps(body).encode()), 400)
    assert (error["param"], error["code"]) == (missing, "missing_parameter")


@pytest.mark.parametrize("field", ["temprature", "a" * 10_000, "é\n\u2028"])
def test_an_unknown_field_is_refused(served: Running, field):
    error = check_error(send(served, json.dumps(GOOD | {field: None}).encode()), 400)
    assert error["code"] == "unknown_parameter"
    assert field.startswith(error["param"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "end"),
        ("best_of", 2),
        ("best_of", True),
        ("length_penalty", 0.5),
        ("use_beam_search", True),
        ("store", True),
    ],
    ids=str,
)
def test_a_known_field_that_is_not_served_is_refused_unless_it_changes_nothing(served: Running, field, value):
    error = check_error(send(served, json.dumps(GOOD | {field: value}).encode()), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert send(served, json.dumps(GOOD | {field: None}).encode()).status_code == 200


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        ({"prompt": [5] * 250, "max_tokens": 7}, ("250", "7", "256")),
        ({"prompt": [5] * 257, "max_tokens": 1}, ("257", "256")),
        ({"max_tokens": 2**31 - 1}, (str(2**31 - 1), "256")),
    ],
    ids=["prompt and completion", "prompt", "completion"],
)
def test_O9_what_does_not_fit_the_context_is_refused_with_both_numbers(served: Running, body, numbers):
    error = check_error(send(served, json.dumps(GOOD | body).encode()), 400)
    assert all(number in error["message"] for number in numbers), error["message"]


def test_one_bad_prompt_of_many_refuses_them_all(served: Running):
    check_error(served.post(prompt=[[1, 2], [321]]), 400)


def test_a_bad_stream_gets_a_status_and_not_a_stream(served: Running):
    check_error(served.post(prompt=[321], stream=True), 400)


def test_the_official_client_raises_its_own_errors(served: Running):
    with pytest.raises(openai.BadRequestError) as bad:
        served.client().completions.create(model=NAME, prompt="x", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        served.client().completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"


def test_O9_unknown_models_paths_and_methods(served: Running):
    assert check_error(served.post(model="gpt-9", prompt="x"), 404)["code"] == "model_not_found"
    assert check_error(served.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"
    check_error(served.get("/v1/nothing"), 404)
    check_error(served.get("/v1/completions/"), 404)
    answer = served.get("/v1/completions")
    check_error(answer, 405)
    assert answer.headers["allow"] == "POST"
    check_error(served.post("/health"), 405)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": ""},
        {"Content-Encoding": "gzip"},
    ],
    ids=str,
)
def test_O9_anything_but_plain_json_is_refused(served: Running, headers):
    check_error(send(served, json.dumps(GOOD).encode(), **headers), 415)


def test_json_with_a_charset_is_json(served: Running):
    assert send(served, json.dumps(GOOD).encode(), **{"Content-Type": "Application/JSON; charset=utf-8"}).is_success


@pytest.mark.parametrize("announced", [True, False], ids=["with a length", "chunked"])
def test_a_body_over_the_limit_is_refused(served: Running, announced):
    body = b'{"prompt": "' + b"x" * (4 * 2**20) + b'"}'
    content = body if announced else iter([body[:1000], body[1000:]])
    answer = served.http.post("/v1/completions", content=content, headers=JSON)
    check_error(answer, 413)


def test_a_body_of_exactly_the_limit_is_read(serve):
    served = serve(server={"max_body_bytes": 100})
    body = json.dumps(GOOD).encode()
    assert send(served, body + b" " * (100 - len(body))).status_code == 200
    check_error(send(served, body + b" " * (101 - len(body))), 413)


def test_bytes_that_are_not_http_do_not_hurt(served: Running):
    host, port = served.url.removeprefix("http://").split(":")
    for raw in (
        b"\x16\x03\x01 TLS",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(raw)
            assert b" 400 " in client.recv(1000)
    assert served.post(prompt="x").status_code == 200


def test_O9_after_all_of_it_the_server_still_serves(served: Running):
    assert served.get("/health").status_code == 200
    assert served.post(**GOOD).json()["usage"]["completion_tokens"] == 2
    assert served.idle()
