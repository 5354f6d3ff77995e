"""What the server says about itself, its tokenizer and its experts; names of requests; methods."""

import re

import openai
import pytest

from turnout.inference.server.app import ROUTES
from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, Running
from .test_bad_input import check_error

MESSAGES = [{"role": "user", "content": "naïve?"}]


def test_a_text_is_tokenized_and_comes_back(served: Running, byte_level):
    text = "naïve 日本 <|endoftext|>"
    found = served.http.post("/tokenize", json={"model": NAME, "prompt": text}).json()
    ids = byte_level.encode(text)
    assert found == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    assert served.http.post("/detokenize", json={"model": NAME, "tokens": ids}).json() == {"prompt": text}
    assert served.http.post("/detokenize", json={"tokens": [0]}).json() == {"prompt": "<|endoftext|>"}
    assert served.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert served.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    strings = served.http.post("/tokenize", json={"prompt": "a日", "return_token_strs": True}).json()["token_strs"]
    assert (strings[0], len(strings)) == ("a", len(byte_level.encode("a日")))


def test_a_chat_is_tokenized_as_it_is_answered(served: Running, byte_level):
    found = served.http.post("/tokenize", json={"model": NAME, "messages": MESSAGES}).json()
    assert byte_level.decode(found["tokens"]) == "user: naïve?\nassistant:"
    answer = served.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1)
    assert answer.json()["usage"]["prompt_tokens"] == found["count"]
    for options, text in (
        ({"add_generation_prompt": False}, "user: naïve?\n"),
        ({"continue_final_message": True}, "user: naïve?"),
    ):
        tokens = served.http.post("/tokenize", json={"messages": MESSAGES} | options).json()["tokens"]
        assert byte_level.decode(tokens) == text
        usage = served.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, **options).json()["usage"]
        assert usage["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": MESSAGES, "chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "x", "colour": 1}, "colour"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 321]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ],
    ids=str,
)
def test_bad_tokenizing_is_refused_naming_the_parameter(served: Running, path, body, param):
    assert check_error(served.http.post(path, json=body), 400)["param"] == param


def test_another_model_has_another_tokenizer(served: Running):
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert check_error(served.post(path, model="gpt-9", **body), 404)["code"] == "model_not_found"


def test_load_counts_the_calls_in_flight(serve):
    served = serve(server={"keepalive_seconds": 0.05})
    assert served.get("/load").json() == {"server_load": 0}
    served.engine.gate.clear()
    body = {"model": NAME, "prompt": "x", "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        assert served.get("/load").json() == {"server_load": 1}
        served.engine.gate.set()
        answer.read()
    assert eventually(lambda: served.get("/load").json() == {"server_load": 0})


def test_version_and_model(served: Running):
    from turnout import __version__

    assert served.get("/version").json() == {"version": __version__}
    assert [model.id for model in served.client().models.list()] == [NAME]
    assert served.client().models.retrieve(NAME).max_model_len == 256


def test_embeddings_are_refused_with_the_reason(served: Running):
    with pytest.raises(openai.BadRequestError, match="no embedding") as refused:
        served.client().embeddings.create(model=NAME, input="x")
    assert (refused.value.code, refused.value.type) == ("unsupported_endpoint", "invalid_request_error")


def test_M10_experts_are_counted_by_layer_since_start_and_lately(serve, model):  # noqa: N802
    served = serve()
    usage = served.post(prompt="The import", max_tokens=20, ignore_eos=True).json()["usage"]
    found = served.get("/v1/experts?seconds=60").json()
    assert (found["model"], found["num_experts"], found["top_k"]) == (NAME, 4, 1)
    tokens = usage["total_tokens"] - 1  # the last one is not computed
    for part in (found["since_start"], found["window"]):
        assert [layer["layer"] for layer in part["layers"]] == list(model.cfg.moe_layers)
        for layer in part["layers"]:
            assert sum(layer["counts"]) == tokens
            assert layer["shares"] == [count / tokens for count in layer["counts"]]
            assert (layer["dropped"], layer["drop_fraction"]) == (0, 0)
            assert 0 < layer["entropy"] < 1.4
    assert 0 <= found["window"]["seconds"] <= found["since_start"]["seconds"]


def test_a_dense_model_has_no_experts(serve, make_model):
    served = serve(of=make_model(moe=None))
    error = check_error(served.get("/v1/experts"), 404)
    assert error["code"] == "no_experts"
    assert "dense" in error["message"]


@pytest.mark.parametrize("query", ["seconds=0", "seconds=61", "seconds=x", "seconds=1&seconds=2", "seconds=", "last=5"])
def test_a_bad_window_is_refused(served: Running, query):
    assert check_error(served.get(f"/v1/experts?{query}"), 400)["param"] == query.split("=")[0]


@pytest.mark.parametrize(("method", "path", "handler"), ROUTES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_route_tells_its_methods(served: Running, method, path, handler):
    path = path.replace("{name:path}", NAME)
    allowed = {"POST"} if method == "POST" else {"GET", "HEAD"}
    for wrong in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - allowed:
        answer = served.http.request(wrong, path)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == allowed
        if wrong != "HEAD":
            check_error(answer, 405)
    if method == "GET":
        whole, head = served.get(path), served.http.head(path)
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]


GOOD_IDS = ["a", "x" * 128, "{trace: 1} ~"]
BAD_IDS = ["", "x" * 129, "é".encode(), b"tab\tid"]


@pytest.mark.parametrize("given", GOOD_IDS)
def test_a_sane_request_id_is_taken_over(served: Running, given):
    answers = [
        served.http.get(path, headers={"X-Request-Id": given}) for path in ("/health", "/nothing", "/v1/completions")
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == [given] * 3


@pytest.mark.parametrize("given", BAD_IDS)
def test_any_other_is_replaced(served: Running, given):
    """Also where its bytes make the whole head a bad one, which never becomes a request."""
    seen = {served.http.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"] for _ in range(2)}
    assert len(seen) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in seen)


def test_streams_and_refusals_are_named_too(serve):
    served = serve(server={"api_key": "secret"})
    refused = served.post(prompt="x")
    assert (refused.status_code, len(refused.headers["x-request-id"])) == (401, 32)
    client = served.client(api_key="secret", default_headers={"X-Request-Id": "mine"})
    with client.completions.with_streaming_response.create(model=NAME, prompt="x", stream=True) as answer:
        assert answer.headers["x-request-id"] == "mine"
        assert answer.read().endswith(b"[DONE]\n\n")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=NAME, prompt="x", temperature=3)
    assert bad.value.request_id == "mine"
