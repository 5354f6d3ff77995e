"""An encoder-decoder behind the API: the prompt is the encoder's input, what it can not do is refused by name."""

import pytest

from turnout.inference.text.chat import ChatTemplate

from .conftest import NAME, Running, Serve
from .test_bad_input import check_error

TEXT = "The import statement combines two operations."


@pytest.fixture
def running(serve: Serve, t5) -> Running:
    return serve(of=t5)


def test_completions_read_the_prompt_and_count_it(running: Running, byte_level):
    client = running.client().completions
    whole = client.create(model=NAME, prompt=[TEXT, "x"], max_tokens=12, temperature=0, n=2, logprobs=1)
    sizes = [len(byte_level.encode(prompt)) for prompt in (TEXT, "x")]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (sum(sizes), 4 * 12)
    assert len({choice.text for choice in whole.choices}) == 2, "one text a prompt"
    parts = ["", "", "", ""]
    for chunk in client.create(model=NAME, prompt=[TEXT, "x"], max_tokens=12, temperature=0, n=2, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == [choice.text for choice in whole.choices]
    assert whole.choices[0].logprobs.text_offset[0] == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"echo": True}, "echo can not be true: the model is an encoder-decoder"),
        ({"prompt_logprobs": 1}, "prompt_logprobs (1) can not be given: an encoder reads the prompt"),
        ({"prompt": [1] * 64}, "must not exceed 63 (max_num_batched_tokens - 1: the encoder reads it in one step)"),
        ({"max_tokens": 256}, "start token (1) + max_tokens (256) must not exceed max_model_len (256)"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_what_it_can_not_do_is_refused_by_name(running: Running, body, message):
    assert message in check_error(running.post(**({"prompt": TEXT} | body)), 400)["message"]
    assert running.post(prompt=TEXT, max_tokens=1).status_code == 200


def test_a_chat_needs_a_template_of_the_models_own(running: Running):
    chat = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 5, "temperature": 0}
    error = check_error(running.post("/v1/chat/completions", **chat), 400)
    assert error["code"] == "no_chat_template"
    assert "use /v1/completions" in error["message"]
    engine = running.server.service.engine
    engine.chat = ChatTemplate(engine.tokenizer, "{{ messages[0].content }}")
    answer = running.post("/v1/chat/completions", **chat).json()["choices"][0]["message"]["content"]
    assert answer == running.post(prompt=TEXT, max_tokens=5, temperature=0).json()["choices"][0]["text"]
