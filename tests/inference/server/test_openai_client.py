"""The official client against every endpoint and option; tools have a file of their own, embeddings are in test_api."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pydantic
import pytest

from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, SLOW, Running

PROMPT = "The import statement"
MESSAGES = [{"role": "user", "content": PROMPT}]
USAGE = {"include_usage": True}


def complete(client, **options):
    return client.completions.create(**({"model": NAME, "prompt": PROMPT, "max_tokens": 12, "seed": 3} | options))


def chat(client, **options):
    return client.chat.completions.create(**({"model": NAME, "messages": MESSAGES, "max_tokens": 12} | options))


COMPLETIONS = [
    {"n": 2, "logprobs": 2, "temperature": 1.5},
    {"echo": True, "logprobs": 0, "top_p": 0.9},
    {"stop": ["e", "\n"], "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"5": 3}},
    {"prompt": [[5, 6], [7]], "user": "me", "best_of": 1, "suffix": ""},
    {"extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True}},
    {"extra_body": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}}}},
]


@pytest.mark.parametrize("options", COMPLETIONS, ids=str)
def test_a_streamed_completion_joins_to_the_whole(served: Running, options):
    client = served.client()
    whole = complete(client, **options)
    chunks = list(complete(client, **options, stream=True, stream_options=USAGE))
    assert chunks[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        if choice.logprobs:
            tokens = [token for part in parts if part.logprobs for token in part.logprobs.tokens]
            assert tokens == choice.logprobs.tokens
    assert complete(client, **options).choices == whole.choices


def test_a_chats_shape_is_parsed_by_the_client(served: Running):
    class Person(pydantic.BaseModel):
        ok: bool

    blanks = {str(token): -100 for token in range(321) if not served.engine.tokenizer.token_bytes(token).strip()}
    answer = served.client().chat.completions.parse(
        model=NAME, messages=MESSAGES, response_format=Person, max_tokens=60, logit_bias=blanks
    )
    assert isinstance(answer.choices[0].message.parsed, Person)
    text = chat(served.client(), response_format={"type": "json_object"}, logit_bias=blanks).choices[0].message.content
    assert text.startswith("{")


def test_the_clients_stream_helper_sees_a_chats_end(served: Running):
    shape = {"structured_outputs": {"choice": ["naïve café"]}}
    with served.client().chat.completions.stream(model=NAME, messages=MESSAGES, extra_body=shape) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("stop", "naïve café")
    assert kinds.count("content.delta") > 1
    assert kinds[-1] == "content.done"


def test_prompts_are_cut_and_spelled_as_asked(served: Running, byte_level):
    ids = byte_level.encode(PROMPT * 30)
    assert len(ids) > 256
    client = served.client()

    def used(**extra):
        return complete(client, prompt=ids, temperature=0, extra_body=extra)

    five, cut = used(truncate_prompt_tokens=5), complete(client, prompt=ids[-5:], temperature=0)
    assert (five.usage.prompt_tokens, five.choices[0].text) == (5, cut.choices[0].text)
    assert used(truncate_prompt_tokens=-1).usage.prompt_tokens == 256 - 12
    text = complete(client, extra_body={"truncate_prompt_tokens": 2, "add_special_tokens": False}, echo=True)
    assert text.choices[0].text.startswith(byte_level.decode(byte_level.encode(PROMPT)[-2:]))
    cut_chat = chat(client, extra_body={"truncate_prompt_tokens": 3})
    assert cut_chat.usage.prompt_tokens == 3
    with pytest.raises(openai.BadRequestError, match="must not exceed"):
        used()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"extra_body": {"logits_processors": ["x"]}}, "logits_processors"),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused_with_what_is_instead(served: Running, options, param):
    with pytest.raises(
        openai.BadRequestError, match=rf"{param} is not served by this server \(.+\): leave it out"
    ) as bad:
        complete(served.client(), **options)
    assert (bad.value.param, bad.value.code) == (param, "unsupported_parameter")


def test_a_client_that_loses_patience_leaves_nothing(serve):
    served = serve()
    served.engine.gate.clear()
    with pytest.raises(openai.APITimeoutError):
        complete(served.client(timeout=0.2))
    served.engine.gate.set()
    assert eventually(served.idle)


@pytest.mark.full
def test_a_full_queue_is_tried_again_when_it_says(serve):
    served = serve(max_num_seqs=1, max_waiting=1)
    served.engine.pace = SLOW
    long = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(complete, served.client(), **long)]
        assert eventually(lambda: served.engine.stats().running == 1)
        calls.append(pool.submit(complete, served.client(), **long))
        assert eventually(lambda: served.engine.stats().waiting == 1)
        with pytest.raises(openai.RateLimitError) as full:
            complete(served.client())
        assert (full.value.code, full.value.response.headers["retry-after"]) == ("queue_full", "1")
        patient = served.client(max_retries=3).completions.with_raw_response
        third = pool.submit(complete, SimpleNamespace(completions=patient))
        refusals = "http_requests_total{route=/v1/completions,status=429}"
        assert eventually(lambda: served.metrics().get(refusals, 0) >= 2)
        served.engine.pace = 0.0
        assert third.result().retries_taken >= 1
        assert third.result().parse().usage.completion_tokens == 12
        assert [call.result().usage.completion_tokens for call in calls] == [100, 100]


@pytest.mark.full
def test_a_server_that_loads_is_tried_again_when_it_says(serve):
    loading = threading.Event()
    served = serve(loading=loading)
    with pytest.raises(openai.InternalServerError) as busy:
        complete(served.client())
    assert (busy.value.status_code, busy.value.response.headers["retry-after"]) == (503, "5")
    threading.Timer(1.0, loading.set).start()
    assert complete(served.client(max_retries=2)).usage.completion_tokens == 12


def test_an_asynchronous_client_streams_too(served: Running):
    async def read() -> str:
        async with served.async_client() as client:
            stream = await complete(client, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(read()) == complete(served.client()).choices[0].text


def test_a_raw_answer_is_json_of_the_same(served: Running):
    raw = served.client().models.with_raw_response.list()
    assert json.loads(raw.text)["data"][0]["id"] == NAME
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("gpt-9")
