"""`/v1/chat/completions` is a completion of the rendered chat, in the shape of chats."""

import pytest

from turnout.inference.text.chat import ChatTemplate

from .conftest import NAME, Running

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "naïve café?"}]


def chat(served: Running, **body):
    return served.post("/v1/chat/completions", **({"messages": CHAT, "max_tokens": 20, "seed": 4} | body))


def test_a_chat_is_the_completion_of_its_rendered_prompt(served: Running):
    prompt = "system: Be short.\nuser: naïve café?\nassistant:"
    expected = served.client().completions.create(model=NAME, prompt=prompt, max_tokens=20, seed=4)
    answer = served.client().chat.completions.create(model=NAME, messages=CHAT, max_tokens=20, seed=4)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.usage.prompt_tokens, 20)


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1.5}, {"logprobs": True, "top_logprobs": 2}], ids=str)
def test_a_streamed_chat_begins_with_the_role_and_joins_to_the_whole(served: Running, options):
    whole = served.client().chat.completions.create(model=NAME, messages=CHAT, max_tokens=20, seed=4, **options)
    chunks = list(
        served.client().chat.completions.create(
            model=NAME,
            messages=CHAT,
            max_tokens=20,
            seed=4,
            **options,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        reasons = [part.finish_reason for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [choice.finish_reason]
        if choice.logprobs is not None:
            content = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
            assert content == choice.logprobs.content
            assert len(content) == 20
            assert all(len(entry.top_logprobs) == 2 for entry in content)
            data = bytes(byte for entry in content for byte in entry.bytes)
            assert data.decode(errors="replace") == choice.message.content


def test_without_a_limit_a_chat_may_fill_the_context(served: Running):
    usage = chat(served, max_tokens=None).json()["usage"]
    assert usage["total_tokens"] == 256


def test_the_newer_name_of_the_limit_wins(served: Running):
    assert chat(served, max_tokens=5, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_newer_roles_and_text_parts_are_the_same_chat(served: Running):
    parts = [{"type": "text", "text": "naïve"}, {"type": "text", "text": "café?"}]
    newer = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    older = [CHAT[0], {"role": "user", "content": "naïve\ncafé?"}]
    texts = [chat(served, messages=m).json()["choices"][0]["message"]["content"] for m in (newer, older)]
    assert texts[0] == texts[1]


def test_an_answer_can_be_sent_back_as_the_client_holds_it(served: Running):
    client = served.client()
    answer = client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=4)
    messages = [*CHAT, answer.choices[0].message.model_dump(), {"role": "user", "content": "More."}]
    assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=4).usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [CHAT[0], {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"prompt": "x"}, "prompt"),
    ],
    ids=str,
)
def test_a_bad_chat_is_refused_naming_the_parameter(served: Running, body, param):
    answer = chat(served, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_what_a_template_refuses_is_the_clients_error(serve, byte_level, model):
    served = serve()
    source = "{{ raise_exception('roles must alternate') }}"
    served.server.service.engine.chat = ChatTemplate(byte_level, source)
    answer = chat(served)
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]
