"""Messages and tools of a chat, and how the model's template makes a prompt of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from ..text.chat import ChatTemplate
from . import neutral as known
from .errors import ApiError
from .strict import ANYTHING, Strict, bad
from .tools import FunctionName, Tool

MAX_MESSAGES = 4096
MAX_CALLS = 128
MAX_TOOLS = 128
MAX_VARIABLES = 32
MAX_ID = 128

CallId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]


class Part(Strict):
    """A part of a message's content: OpenAI has others than text, which can not be served."""

    type: Literal["text"]
    text: str


def _text(value: object) -> object:
    """A message's content as text."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise bad('must be a text or a list of parts {"type": "text", "text": ...}')
        if not isinstance(part["text"], str):
            raise bad("the text of each part must be a string")
    return "\n".join(part["text"] for part in value)


def _arguments(text: str) -> str:
    """Only what is an object can have been a call's arguments; nothing at all is one without any."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad("must be a JSON object, written as a text")
    return text or "{}"


class CalledFunction(Strict):
    """Which function an assistant called, and with what."""

    name: FunctionName
    arguments: Annotated[str, BeforeValidator(lambda value: _arguments(value) if isinstance(value, str) else value)]


class ToolCall(Strict):
    """A call that an assistant made."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = {"index": ANYTHING}

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


def _role(name: str) -> dict[str, JsonValue]:
    return {"properties": {"role": {"const": name}}}


def _given(field: str) -> dict[str, JsonValue]:
    return {"required": [field], "properties": {field: {"not": {"type": "null"}}}}


def _absent(field: str) -> dict[str, JsonValue]:
    return {"properties": {field: {"enum": [None, []]}}}


class Message(Strict):
    """One message of a chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {"if": _role("tool"), "then": _given("tool_call_id"), "else": _absent("tool_call_id")},
                {"if": _role("assistant"), "else": _absent("tool_calls")},
            ]
        }
    )
    neutral: ClassVar[Mapping[str, Sequence[object]]] = known.MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[Part])] = ""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] = Field(default_factory=list)
    tool_call_id: CallId | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise _refused("tool_calls", f"belong to messages of the role assistant, not {self.role}: leave them out")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise _refused("tool_call_id", "belongs to messages of the role tool, and to each: name the call")
        return self


class ChatInput(Strict):
    """What a chat's prompt is made of, in OpenAI's and vLLM's names."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: Annotated[dict[str, JsonValue], Field(max_length=MAX_VARIABLES)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise _refused("continue_final_message", "and add_generation_prompt exclude each other: set one")
        return self

    @model_validator(mode="after")
    def _check_calls(self) -> Self:
        """Every tool's message answers a call that was made before it; names are unique."""
        made: set[str] = set()
        for i, message in enumerate(self.messages):
            made |= {call.id for call in message.tool_calls}
            if message.tool_call_id is not None and message.tool_call_id not in made:
                rule = f"({message.tool_call_id}) must be the id of a call of an assistant's message before it"
                raise _refused(f"messages[{i}].tool_call_id", rule)
        names = [tool.function.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise _refused("tools", f"have the function {name} twice: name each differently")
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return self.tools

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages for the chat template; `developer` is OpenAI's newer name of `system`."""
        called = {call.id: call.function.name for message in self.messages for call in message.tool_calls}
        return [_plain(message, called) for message in self.messages]

    def encode(self, template: ChatTemplate) -> list[int]:
        """The prompt's token ids.

        Raises:
            ApiError: 400, the template knows nothing of tools or of one of the variables.
            RequestError: the template refuses the messages.
        """
        tools = [tool.shown() for tool in self.shown_tools]
        if not template.knows("tools"):
            rule = "can not be served: the chat template of this checkpoint knows nothing of tools"
            if tools:
                raise _refused("tools", rule, "unsupported_parameter")
            if any(message.tool_calls for message in self.messages):
                raise _refused("messages", f"with tool_calls {rule}", "unsupported_parameter")
        for name in self.chat_template_kwargs:
            if not template.takes(name):
                rule = f"({name}) must be variables that the checkpoint's chat template reads: leave it out"
                raise _refused("chat_template_kwargs", rule)
        return template.encode(
            self.chat,
            not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt,
            tools=tools,
            variables=self.chat_template_kwargs,
            continue_final=self.continue_final_message,
            add_special_tokens=self.add_special_tokens,
        )


def _plain(message: Message, called: Mapping[str, str]) -> dict[str, Any]:
    """A message as templates read it: arguments are an object, a tool's answer has the name of its function."""
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.content}
    if message.tool_call_id is not None:
        found |= {"tool_call_id": message.tool_call_id, "name": called[message.tool_call_id]}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": json.loads(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _refused(param: str, rule: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param} {rule}", param=param, code=code)
