"""`/v1/completions` gives what the engine gives, through the official client, streamed or not."""
# ruff: noqa: N802 (O1 is the name of a rule)

import asyncio
import itertools

import pytest

from turnout.inference.config import EngineConfig
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine

from .conftest import ENGINE, NAME, Running

PROMPT = "The import statement"


@pytest.fixture(scope="module")
def alone(model, byte_level):
    """The engine without a server: prompt, parameters → its final output."""

    def complete(prompt, **params):
        engine = Engine(model, byte_level, EngineConfig(**ENGINE))
        engine.add_request("x", prompt, SamplingParams(**params))
        outputs = []
        while engine.has_unfinished:
            outputs = engine.step() or outputs
        return outputs[-1]

    return complete


def test_O7_a_completion_is_the_engines_with_exact_usage(served: Running, alone):
    expected = alone(PROMPT, temperature=0, max_tokens=24)
    answer = served.client().completions.create(model=NAME, prompt=PROMPT, temperature=0, max_tokens=24)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, expected.outputs[0].text, "length")]
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == len(expected.prompt_token_ids) + 24


def test_text_and_token_ids_alone_and_in_lists_are_the_same_prompt(served: Running, byte_level):
    texts = [PROMPT, "def push(self)"]
    ids = [byte_level.encode(text) for text in texts]
    options = {"temperature": 0, "max_tokens": 12}
    single = [served.post(prompt=text, **options).json() for text in texts]
    expected = [answer["choices"][0]["text"] for answer in single]
    assert len(set(expected)) == 2
    assert served.post(prompt=ids[0], **options).json()["choices"][0]["text"] == expected[0]
    for prompts in (texts, ids):
        answer = served.post(prompt=prompts, **options).json()
        assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(expected))
        assert answer["usage"]["prompt_tokens"] == sum(len(prompt) for prompt in ids)
        assert answer["usage"]["completion_tokens"] == 24


def test_n_choices_are_distinct_and_a_seed_repeats_them(served: Running):
    first, second = (
        served.client().completions.create(model=NAME, prompt=PROMPT, n=4, seed=7, temperature=1.5, max_tokens=12)
        for _ in range(2)
    )
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert texts == [choice.text for choice in second.choices]
    assert first.usage.completion_tokens == 48


MIXES = {
    "greedy": {"temperature": 0},
    "seeded": {"seed": 3, "temperature": 1.5, "top_k": 50, "top_p": 0.95},
    "two prompts, n": {"prompt": [PROMPT, "naïve café"], "n": 3, "seed": 1, "temperature": 1.5},
    "logprobs": {"logprobs": 3, "seed": 2, "temperature": 1.5},
    "stop": {"stop": ["e", " t"], "n": 4, "seed": 5, "temperature": 1.5, "max_tokens": 100},
    "stop shown": {"stop": "e", "include_stop_str_in_output": True, "seed": 5, "temperature": 1.5, "logprobs": 0},
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_O1_a_stream_joined_is_the_answer_in_one_piece(served: Running, mix):
    body = {"prompt": PROMPT, "max_tokens": 30} | mix
    whole = served.post(**body).json()
    *chunks, usage, done = served.stream(**body, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert "[DONE]" not in chunks
    assert usage["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][key] == whole["usage"][key]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for key in choice["logprobs"] or ():
            joined = list(itertools.chain.from_iterable(part["logprobs"][key] for part in parts))
            assert joined == choice["logprobs"][key]


def test_a_stop_string_ends_the_text_before_it(served: Running):
    free = served.post(prompt=PROMPT, temperature=0, max_tokens=40).json()["choices"][0]["text"]
    stop = free[10:12]
    choice = served.post(prompt=PROMPT, temperature=0, max_tokens=40, stop=stop).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == free[: free.index(stop)]


def test_vllms_sampling_fields_are_served(served: Running, alone):
    free = alone(PROMPT, temperature=0, max_tokens=20).outputs[0]
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 2.0, "top_k": 1}  # top_k=1 is greedy
    assert served.post(**body).json()["choices"][0]["text"] == free.text
    assert served.post(**body, ignore_eos=True).json()["usage"]["completion_tokens"] == 20
    stopped = served.post(**body, stop_token_ids=free.token_ids, min_tokens=3).json()
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] > 3


def test_twelve_concurrent_streams_equal_their_texts_in_one_piece(served: Running):
    prompts = [f"{PROMPT} {i} naïve 日本語"[: 12 + 2 * i] for i in range(12)]

    async def one(client, prompt, stream):
        options = {"model": NAME, "prompt": prompt, "max_tokens": 40, "temperature": 1.2, "seed": len(prompt)}
        if not stream:
            return (await client.completions.create(**options)).choices[0].text
        chunks = await client.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def run():
        async with served.async_client() as client:
            whole = [await one(client, prompt, stream=False) for prompt in prompts]
            streams = await asyncio.gather(*(one(client, prompt, stream=True) for prompt in prompts))
        return whole, list(streams)

    whole, streams = asyncio.run(run())
    assert [text.encode() for text in streams] == [text.encode() for text in whole]
    assert len(set(whole)) == 12


def test_O5_logprobs_hold_every_sampled_token_and_where_it_begins(served: Running, alone):
    params = {"temperature": 0, "max_tokens": 30, "logprobs": 2, "skip_special_tokens": False}
    expected = alone(PROMPT, **params).outputs[0]
    choice = served.post(prompt=PROMPT, **params).json()["choices"][0]
    found = choice["logprobs"]
    assert found["token_logprobs"] == [
        pytest.approx(row[token]) for row, token in zip(expected.logprobs, expected.token_ids, strict=True)
    ]
    assert len(found["tokens"]) == len(found["top_logprobs"]) == len(found["text_offset"]) == 30
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values())  # greedy
        assert len(top) == 2
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)


def test_O7_a_repeated_prompt_reports_its_cached_tokens(served: Running):
    prompt = list(range(40, 90))
    served.post(prompt=prompt, max_tokens=1)
    usage = served.client().completions.create(model=NAME, prompt=prompt, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens == 48  # 3 of its blocks of 16
    assert usage.prompt_tokens == 50


def test_fields_that_change_nothing_are_accepted(served: Running):
    answer = served.client().completions.create(
        model=NAME,
        prompt=PROMPT,
        max_tokens=2,
        user="someone",
        echo=False,
        suffix=None,
        best_of=1,
        logit_bias={},
        presence_penalty=0.0,
        frequency_penalty=0,
        extra_body={"min_p": 0.0, "repetition_penalty": 1.0, "metadata": {"a": "b"}, "store": False},
    )
    assert answer.usage.completion_tokens == 2


def test_the_model_is_listed(served: Running):
    client = served.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "turnout"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_token_ids_of_prompt_and_completion_come_with_the_text_streamed_or_not(served: Running, byte_level, path):
    prompt = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    body = prompt | {"max_tokens": 9, "n": 2, "seed": 3, "return_token_ids": True}
    whole = served.post(path, **body).json()
    chat = path != "/v1/completions"
    text = f"user: {PROMPT}\nassistant:" if chat else PROMPT
    streamed = {0: [], 1: []}
    frames = served.stream(path, **body)[:-1]
    for frame in frames:
        for choice in frame["choices"]:
            streamed[choice["index"]] += choice.get("token_ids", [])
    for choice in whole["choices"]:
        assert len(choice["token_ids"]) == 9
        assert byte_level.decode(choice["token_ids"]) == (choice["message"]["content"] if chat else choice["text"])
        assert streamed[choice["index"]] == choice["token_ids"]
    assert "token_ids" not in served.post(path, **(body | {"return_token_ids": False})).json()["choices"][0]
    holders = [[whole], frames] if chat else [[c] for c in whole["choices"]] + [[f["choices"][0] for f in frames]]
    for holder in holders:
        found = [ids for part in holder if (ids := part.get("prompt_token_ids")) is not None]
        assert found[0] == byte_level.encode(text)
        assert len(found) == (2 if holder is holders[-1] and not chat else 1)
