"""The sampling fields over HTTP: they do what they do in the engine, and every form of an answer is the same answer."""

import itertools

import pytest
import torch

from turnout.inference.config import EngineConfig
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.server.logprobs import finite

from .conftest import ENGINE, NAME, Running

PROMPT = "The import statement"
IDS = [5, 9, 200, 41, 42, 43, 44, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110]


@pytest.fixture(scope="module")
def alone(model, byte_level):
    """The engine without a server and without a prefix cache: prompt, parameters → its final output."""

    def complete(prompt, **params):
        engine = Engine(model, byte_level, EngineConfig(**ENGINE, enable_prefix_caching=False))
        engine.add_request("x", prompt, SamplingParams(**params))
        outputs = []
        while engine.has_unfinished:
            outputs = engine.step() or outputs
        return outputs[-1]

    return complete


WISHES = [
    {"min_p": 0.2, "seed": 1},
    {"repetition_penalty": 1.5, "temperature": 0},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0},
    {"allowed_token_ids": [60, 61, 62, 63, 64], "seed": 2},
    {"bad_words": ["W", "nes"], "temperature": 0},
]


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: next(iter(wish)))
def test_what_the_engine_does_is_served_on_both_endpoints(served: Running, alone, wish):
    plain = alone(PROMPT, max_tokens=24, **{key: wish[key] for key in ("temperature", "seed") if key in wish})
    expected = alone(PROMPT, max_tokens=24, **wish).outputs[0].text
    assert expected != plain.outputs[0].text
    assert served.post(prompt=PROMPT, max_tokens=24, **wish).json()["choices"][0]["text"] == expected
    messages = [{"role": "user", "content": PROMPT}]
    prompt = served.server.service.engine.chat.encode(messages)
    answer = served.post("/v1/chat/completions", messages=messages, max_tokens=24, **wish).json()
    assert answer["choices"][0]["message"]["content"] == alone(prompt, max_tokens=24, **wish).outputs[0].text


def test_a_bias_comes_with_openais_text_keys(served: Running, alone):
    expected = alone(PROMPT, max_tokens=8, temperature=0, logit_bias={60: 100})
    assert expected.outputs[0].token_ids == [60] * 8
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logit_bias": {"60": 100}}
    assert served.client().completions.create(**options).choices[0].text == expected.outputs[0].text


MIXES = {
    "echo": {"echo": True},
    "echo, logprobs": {"echo": True, "logprobs": 2},
    "echo, sampled alone": {"echo": True, "logprobs": 0, "n": 2},
    "echo, ids": {"echo": True, "prompt": IDS, "logprobs": 1},
    "echo, cut character": {"echo": True, "prompt": [*IDS[:3], 175], "logprobs": 1},
    "echo, prompts, n, stop": {"echo": True, "prompt": [PROMPT, "naïve"], "n": 3, "stop": ["e", " t"], "logprobs": 3},
    "echo, stop shown": {"echo": True, "stop": "e", "include_stop_str_in_output": True, "logprobs": 1},
    "echo, special shown": {"echo": True, "prompt": [0, 50, 0, 51], "skip_special_tokens": False, "logprobs": 0},
    "scored": {"echo": True, "logprobs": 2, "max_tokens": 0, "n": 2},
    "scored, text alone": {"echo": True, "max_tokens": 0},
    "one token": {"max_tokens": 1},
    "penalties, n, stop": {"repetition_penalty": 1.2, "presence_penalty": 1, "n": 3, "stop": ["a", "o"], "logprobs": 1},
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_O1_O5_O7_a_stream_joined_is_the_answer_in_one_piece(served: Running, byte_level, mix):  # noqa: N802
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 1.2, "seed": 5} | mix
    whole = served.post(**body).json()
    *chunks, usage, done = served.stream(**body, stream_options={"include_usage": True})
    assert done == "[DONE]"
    single = isinstance(body["prompt"], str) or isinstance(body["prompt"][0], int)
    prompts = [body["prompt"]] if single else body["prompt"]
    texts = [p if isinstance(p, str) else byte_level.decode(p, body.get("skip_special_tokens", True)) for p in prompts]
    sizes = [len(byte_level.encode(p) if isinstance(p, str) else p) for p in prompts]
    assert len(whole["choices"]) == len(prompts) * body.get("n", 1)
    assert whole["usage"]["prompt_tokens"] == usage["usage"]["prompt_tokens"] == sum(sizes)
    assert whole["usage"]["completion_tokens"] == usage["usage"]["completion_tokens"]
    completion = 0
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts).encode() == choice["text"].encode()
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        place = choice["index"] // body.get("n", 1)
        if body.get("echo"):
            assert choice["text"].startswith(texts[place].rstrip("�"))
        found = choice["logprobs"]
        assert (found is None) == ("logprobs" not in body)
        for key in found or ():
            joined = list(itertools.chain.from_iterable(part["logprobs"][key] for part in parts))
            assert len(joined) == len(found[key])
            for one, other in zip(joined, found[key], strict=True):
                assert one == (pytest.approx(other, abs=1e-5) if "logprobs" in key else other), (
                    "batches round otherwise"
                )
        if found is not None:
            before = sizes[place] if body.get("echo") else 0
            completion += len(found["tokens"]) - before
            check_logprobs(choice, body["logprobs"], scored=bool(body.get("echo")))
    if "logprobs" in body:
        assert completion == whole["usage"]["completion_tokens"], "one a completion token, prompts counted apart"


def check_logprobs(choice: dict, top: int, scored: bool) -> None:
    found, text = choice["logprobs"], choice["text"]
    assert len({len(values) for values in found.values()}) == 1
    rows = list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], found["text_offset"], strict=True))
    for i, (token, logprob, best, offset) in enumerate(rows):
        if scored and i == 0:
            assert (logprob, best) == (None, None)
        else:
            assert best[token] == logprob
            assert -9999 <= logprob <= 0
            assert len(best) <= top + 1
        begun = offset <= len(text) - len(token)
        if begun and not token.startswith(("bytes:", "<|")):
            assert text[offset:].startswith(token)


def test_O11_echo_is_right_on_a_prefix_cache_hit(served: Running, alone, byte_level):  # noqa: N802
    body = {"prompt": list(range(60, 110)), "max_tokens": 3, "temperature": 0}
    served.post(**body)
    assert served.post(**body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 48
    answer = served.post(**body, echo=True, logprobs=1).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    expected = alone(body["prompt"], max_tokens=3, temperature=0, logprobs=1, prompt_logprobs=1)
    ids = [*body["prompt"], *expected.outputs[0].token_ids]
    rows = [*expected.prompt_logprobs, *expected.outputs[0].logprobs]
    found = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert found[1:] == [pytest.approx(row[token], abs=1e-4) for token, row in zip(ids[1:], rows[1:], strict=True)]


def test_text_offsets_of_an_echo_count_characters(served: Running):
    prompt = "naïve café 日本語 👍🏽!"
    choice = served.post(prompt=prompt, max_tokens=6, temperature=0, echo=True, logprobs=0).json()["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith(prompt)
    assert found["text_offset"][0] == 0
    assert found["text_offset"] == sorted(found["text_offset"])
    assert max(offset for offset in found["text_offset"] if offset < len(prompt)) == len(prompt) - 1, "the last one, !"


def test_prompt_logprobs_are_vllms_field(served: Running, alone):
    expected = alone(PROMPT, max_tokens=2, temperature=0, prompt_logprobs=2)
    whole = served.post(prompt=PROMPT, max_tokens=2, temperature=0, prompt_logprobs=2, n=1).json()
    messages = [{"role": "user", "content": PROMPT}]
    chat = served.post("/v1/chat/completions", messages=messages, max_tokens=2, prompt_logprobs=0).json()
    first, *rest = whole["choices"][0]["prompt_logprobs"]
    assert first is None
    assert len(rest) == len(expected.prompt_token_ids) - 1
    for row, wanted in zip(rest, expected.prompt_logprobs[1:], strict=True):
        assert {int(token): pytest.approx(entry["logprob"], abs=1e-4) for token, entry in row.items()} == wanted
    assert (
        "".join(row[str(t)]["decoded_token"] for row, t in zip(rest, expected.prompt_token_ids[1:], strict=True))
        in PROMPT
    )
    assert chat["prompt_logprobs"][0] is None
    assert all(len(row) == 1 for row in chat["prompt_logprobs"][1:])
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    refused = served.post(prompt=PROMPT, stream=True, prompt_logprobs=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_P8_no_tokens_are_generated_only_with_echo(served: Running):  # noqa: N802
    answer = served.post(prompt=PROMPT, max_tokens=0, echo=True).json()
    assert [(c["text"], c["finish_reason"], c["logprobs"]) for c in answer["choices"]] == [(PROMPT, "length", None)]
    assert answer["usage"]["completion_tokens"] == 0
    for body in ({}, {"prompt_logprobs": 1}, {"logprobs": 1}):
        refused = served.post(prompt=PROMPT, max_tokens=0, **body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "max_tokens"
    for path, body in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        refused = served.post(path, **body, max_tokens=4, min_tokens=5)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "min_tokens")
    refused = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_O5_minus_infinity_is_a_number_and_nan_is_500(serve, make_model):  # noqa: N802
    assert finite(-torch.inf) == -9999.0
    model = make_model()
    with torch.no_grad():
        model.embed.weight[300] = torch.nan
    served = serve(of=model)
    for body in ({"max_tokens": 0, "echo": True, "logprobs": 1}, {"max_tokens": 1, "logprobs": 1}):
        assert served.post(prompt=[5, 300, 7], **body).status_code == 500
        assert served.post(prompt=[5, 7], **body).status_code == 200


def test_salts_keep_cached_prefixes_apart(served: Running):
    body = {"prompt": list(range(130, 180)), "max_tokens": 1}

    def cached(**fields) -> int:
        return served.post(**body, **fields).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b"), cached()] == [0, 48, 0, 0]


def test_a_request_that_excludes_every_token_is_told_so(served: Running):
    refused = served.post(prompt=PROMPT, max_tokens=4, min_tokens=2, allowed_token_ids=[7], stop_token_ids=[7])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "allowed_token_ids")
    assert "excluded every token" in refused.json()["error"]["message"]


@pytest.mark.parametrize(("last", "text"), [(2, "a日b"), (0, "ab")], ids=["completed", "left alone"])
def test_O1_a_character_that_begins_in_the_prompt_is_echoed_whole_or_not_at_all(served, byte_level, last, text):  # noqa: N802
    """The completion is the character's last byte and a letter, or only a letter."""
    (a,), cut, (b,) = byte_level.encode("a"), byte_level.encode("日"), byte_level.encode("b")
    assert len(cut) == 3
    then = [*cut[last:], b] if last else [b]
    body = {"prompt": [a, *cut[:2]], "max_tokens": len(then), "echo": True, "logprobs": 0, "temperature": 0}
    bias = {str(then[0]): 100, str(b): 99.5}
    body |= {"allowed_token_ids": then, "logit_bias": bias, "repetition_penalty": 2.0 if last else 1.0}
    choice = served.post(**body).json()["choices"][0]
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"][0] == 0
    assert choice["logprobs"]["text_offset"][-1] == len(text) - 1
    parts = [chunk["choices"][0] for chunk in served.stream(**body)[:-1]]
    assert "".join(part["text"] for part in parts) == text
    offsets = [part["logprobs"]["text_offset"] for part in parts]
    assert list(itertools.chain.from_iterable(offsets)) == choice["logprobs"]["text_offset"]
