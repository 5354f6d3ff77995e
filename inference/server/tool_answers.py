"""The answer to a chat that may call tools: OpenAI's `tool_calls`, whole or in deltas."""

import uuid

from ..outputs import CompletionOutput
from ..text.calls import CallArguments, CallParser, CallStart, Event
from ..text.tokenizer import TextTokenizer
from .answers import ChatAnswer
from .logprobs import Json, Logprobs
from .protocol import ChatRequest
from .tools import NamedChoice


class ToolAnswer(ChatAnswer):
    """A chat's answer with the calls that are in its text; each choice has a parser of its own."""

    plain = False

    def __init__(self, asked: ChatRequest, tokenizer: TextTokenizer, opens: bool) -> None:
        super().__init__(asked, tokenizer, opens)
        self._names = frozenset(tool.function.name for tool in asked.tools)
        self._forced = asked.tool_choice.function.name if isinstance(asked.tool_choice, NamedChoice) else None
        self._most = None if asked.parallel_tool_calls else 1
        self._parsers: dict[int, CallParser] = {}

    def _choice(self, output: CompletionOutput, logprobs: Logprobs | None) -> Json:
        parser = self._parser()
        said, calls = [], []
        for event in [*parser.push(output.text), *parser.finish()]:
            if isinstance(event, CallStart):
                calls.append(_begun(event.name))
            elif isinstance(event, CallArguments):
                calls[event.index]["function"]["arguments"] += event.piece
            else:
                said.append(event)
        spelled = super()._choice(output, logprobs)
        if calls:
            spelled["message"] |= {"content": "".join(said) or None, "tool_calls": calls}
        return spelled | {"finish_reason": _reason(output, parser)}

    def _deltas(self, part: CompletionOutput, index: int, logprobs: Logprobs | None) -> list[Json]:
        parser = self._parsers.setdefault(index, self._parser())
        events = parser.push(part.text)
        if part.finish_reason is not None:
            events += parser.finish()
        deltas: list[Json] = [_delta(event) for event in _joined(events)]
        beside = logprobs is not None or self._asked.return_token_ids or part.routed_experts is not None
        if not deltas and (beside or part.finish_reason is not None):
            deltas = [{}]
        found = logprobs.chat(part) if logprobs else None
        chunks: list[Json] = [{"delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        if chunks:
            chunks[0]["logprobs"] = found
            chunks[-1]["finish_reason"] = _reason(part, parser)
        return chunks

    def _parser(self) -> CallParser:
        return CallParser(self._names, self._forced, self._most)


def _reason(part: CompletionOutput, parser: CallParser) -> str | None:
    return "tool_calls" if part.finish_reason == "stop" and parser.called else part.finish_reason


def _begun(name: str) -> Json:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": ""}}


def _joined(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of one thing as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, str) and isinstance(last, str):
            found[-1] = last + event
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            found[-1] = CallArguments(event.index, last.piece + event.piece)
        else:
            found.append(event)
    return found


def _delta(event: Event) -> Json:
    if isinstance(event, str):
        return {"content": event}
    if isinstance(event, CallStart):
        return {"tool_calls": [{"index": event.index} | _begun(event.name)]}
    return {"tool_calls": [{"index": event.index, "function": {"arguments": event.piece}}]}
