"""Chat templates: the model's own in a sandbox, a plain transcript otherwise."""

import json

import pytest

from turnout import ConfigError, DataError, RequestError
from turnout.inference.text.chat import ChatTemplate

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a module?"}]
CHATML = (
    "{% for message in messages %}\n<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_base_model_gets_a_plain_transcript(byte_level, tmp_path):
    chat = ChatTemplate.from_dir(tmp_path, byte_level)
    text = "system: Be brief.\nuser: What is a module?\nassistant:"
    assert chat.render(MESSAGES) == text
    assert byte_level.decode(chat.encode(MESSAGES)) == text


def test_the_models_template_and_its_tokens_are_used(byte_level, tmp_path):
    settings = {"chat_template": "{{ bos_token }}" + CHATML, "bos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = ChatTemplate.from_dir(tmp_path, byte_level)
    assert chat.render(MESSAGES[1:]) == (
        "<|endoftext|><|im_start|>user\nWhat is a module?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.encode(MESSAGES)[0] == 0


def test_a_template_file_wins_and_named_templates_fall_back_to_default(byte_level, tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_dir(tmp_path, byte_level).render(MESSAGES) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert ChatTemplate.from_dir(tmp_path, byte_level).render(MESSAGES) == "F"


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"]
)
def test_a_template_can_not_leave_its_sandbox_and_may_refuse(byte_level, source):
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(byte_level, source).render(MESSAGES)


def test_no_messages_is_a_bad_request(byte_level):
    with pytest.raises(RequestError, match="at least one"):
        ChatTemplate(byte_level).render([])


def test_a_broken_template_or_config_is_named(byte_level, tmp_path):
    with pytest.raises(ConfigError, match="does not parse"):
        ChatTemplate(byte_level, "{% if %}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        ChatTemplate.from_dir(tmp_path, byte_level)
