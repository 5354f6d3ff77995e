"""Chat messages to a prompt: the model's own jinja2 template, or a plain transcript for a base model.

A template comes with the model, so it is rendered in jinja2's immutable sandbox: no attribute or file access.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ... import ConfigError, DataError, RequestError
from .tokenizer import TextTokenizer

PLAIN = """\
{% for message in messages %}
{{ message.role }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
assistant:{% endif %}"""


OURS = ("messages", "tools", "add_generation_prompt")
"""What `render` tells a template, beside the special tokens."""


class ChatTemplate:
    """Renders and encodes one model's chats.

    Args:
        tokenizer: the model's.
        source: the jinja2 template; None = a plain transcript (`role: content` lines).
        tokens: names that the template may use, such as `bos_token`.

    Raises:
        ConfigError: the template does not parse.

    Attributes:
        own: the template is the model's, not a plain transcript.
    """

    def __init__(
        self, tokenizer: TextTokenizer, source: str | None = None, tokens: Mapping[str, str] | None = None
    ) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        self._tokenizer = tokenizer
        self.own = source is not None
        self._tokens = dict(tokens or {})
        try:
            self._template = environment.from_string(PLAIN if source is None else source)
            self._reads = meta.find_undeclared_variables(environment.parse(PLAIN if source is None else source))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template (line {error.lineno}) does not parse: {error.message}") from error

    @classmethod
    def from_dir(cls, path: str | Path, tokenizer: TextTokenizer) -> "ChatTemplate":
        """The template of `chat_template.jinja` or `tokenizer_config.json` in `path`, or the plain transcript.

        Raises:
            ConfigError: the template does not parse.
            DataError: `tokenizer_config.json` is not JSON.
        """
        settings = _tokenizer_config(Path(path))
        file = Path(path) / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        tokens = {name: _content(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return cls(tokenizer, source, tokens)

    def knows(self, name: str) -> bool:
        """Whether the template reads a variable of this name."""
        return name in self._reads

    def takes(self, name: str) -> bool:
        """Whether a caller may set a variable of this name: the template reads it, and it is none of ours."""
        return self.knows(name) and name not in {*OURS, *self._tokens}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """The prompt of `messages` (each `{"role": ..., "content": ...}`).

        Args:
            messages: the chat.
            add_generation_prompt: end with what an answer begins with.
            tools: what the model may call, in OpenAI's form; a template that does not know tools leaves them out.
            variables: of the template's own.
            continue_final: end where the last message's content ends, so that the model goes on with it.

        Raises:
            RequestError: the template refuses the messages.
        """
        if not messages:
            raise RequestError("messages (0) must hold at least one message: add one", "messages")
        ours = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": list(tools) or None}
        try:
            text = self._template.render(**{**(variables or {}), **self._tokens, **ours})
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RequestError(f"messages do not fit the model's chat template: {error}", "messages") from error
        return _until(text, messages[-1]["content"]) if continue_final else text

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        add_special_tokens: bool | None = None,
        **options: Any,
    ) -> list[int]:
        """The prompt's token ids.

        Args:
            messages, add_generation_prompt, options: as `render` has them.
            add_special_tokens: what the tokenizer adds around a text. None = not to a model's own template, which
                spells its special tokens itself.
        """
        text = self.render(messages, add_generation_prompt, **options)
        add = not self.own if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(text, add_special_tokens=add, parse_special_tokens=self.own)


def _until(text: str, last: str) -> str:
    """`text` up to the end of the last message's content, which a template may have stripped."""
    wanted = last.strip()
    start = text.rfind(wanted)
    if not wanted or start < 0:
        rule = "must end with a message whose content is in the prompt: continue_final_message goes on with it"
        raise RequestError(f"messages {rule}", "messages")
    whole = last.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else wanted)]


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    """transformers' filter, with which templates were written: jinja2's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tokenizer_config(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}): copy the model's tokenizer_config.json again") from error


def _content(token: object) -> str:
    """A special token is written as a string or as `{"content": ...}`."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return token if isinstance(token, str) else ""
