"""The engine's outputs as OpenAI's response objects, whole or in chunks."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

from ..outputs import CompletionOutput
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import TextTokenizer
from .errors import to_json
from .generation import Generation

SMALLEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON can not carry

Json = dict[str, Any]


class Logprobs:
    """Log-probabilities of one choice in OpenAI's two forms; it remembers where in the text the next token starts."""

    def __init__(self, tokenizer: TextTokenizer, top: int, skip_special_tokens: bool, opens: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._detokenizer = Detokenizer(tokenizer, (), skip_special_tokens, opens)
        self._offset = 0

    def completion(self, part: CompletionOutput) -> Json:
        """The form of `/v1/completions`; text_offset counts characters of the choice's text."""
        rows = list(self._rows(part))
        return {
            "tokens": [self._name(token) for token, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [self._by_name([*top, (token, logprob)]) for token, logprob, top in rows],
            "text_offset": [self._advance(token) for token, _, _ in rows],
        }

    def chat(self, part: CompletionOutput) -> Json:
        """The form of `/v1/chat/completions`."""
        return {
            "content": [
                self._entry(token, logprob) | {"top_logprobs": [self._entry(*pair) for pair in top]}
                for token, logprob, top in self._rows(part)
            ],
            "refusal": None,
        }

    def _rows(self, part: CompletionOutput) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
        """(token, its log-probability, the most probable ones in order) of each new token."""
        for token, found in zip(part.token_ids, part.logprobs or (), strict=True):
            best = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[: self._top]
            yield token, _finite(found[token]), [(other, _finite(logprob)) for other, logprob in best]

    def _by_name(self, top: list[tuple[int, float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in top:
            found.setdefault(self._name(token), logprob)
        return found

    def _entry(self, token: int, logprob: float) -> Json:
        return {"token": self._name(token), "logprob": logprob, "bytes": list(self._tokenizer.token_bytes(token))}

    def _name(self, token: int) -> str:
        """The token's text, or OpenAI's spelling of bytes that are no text."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _advance(self, token: int) -> int:
        """Where the token's text begins; it may also bring the last byte of a character before it."""
        piece, name, start = self._detokenizer.push(token), self._name(token), self._offset
        self._offset += len(piece)
        return self._offset - len(name) if piece.endswith(name) else start


def _finite(logprob: float) -> float:
    return max(logprob, SMALLEST_LOGPROB)


class Cursor:
    """How much of one choice has been sent."""

    def __init__(self, logprobs: Logprobs | None) -> None:
        self.logprobs = logprobs
        self._chars = 0
        self._tokens = 0
        self._finished = False

    def advance(self, output: CompletionOutput) -> CompletionOutput | None:
        """What is new in the cumulative `output`, or None when there is nothing to send."""
        part = replace(
            output,
            text=output.text[self._chars :],
            token_ids=output.token_ids[self._tokens :],
            logprobs=None if output.logprobs is None else output.logprobs[self._tokens :],
        )
        silent = not part.text and part.finish_reason is None and not (part.token_ids and self.logprobs)
        if self._finished or silent:
            return None
        self._chars, self._tokens = len(output.text), len(output.token_ids)
        self._finished = part.finish_reason is not None
        return part


class Answer:
    """The answer to one call of `/v1/completions`; `ChatAnswer` overrides what chats spell differently.

    Args:
        model: the name to report.
        tokenizer: spells tokens of log-probabilities.
        include_usage: end a stream with a chunk that has the usage.
        opens: a completion begins a text instead of going on with the prompt's (encoder-decoders).
    """

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, model: str, tokenizer: TextTokenizer, include_usage: bool, opens: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._opens = opens

    def whole(self, generation: Generation) -> bytes:
        """The answer of a finished generation."""
        cursors = self._cursors(generation)
        choices = []
        for prompt, output in enumerate(generation.outputs):
            for choice in output.outputs if output is not None else ():
                index = prompt * generation.params.n + choice.index
                choices.append(self._choice(choice, cursors[index].logprobs) | {"index": index})
        body = {"object": self.whole_object, "choices": choices, "usage": generation.usage()}
        return to_json(self._head | body)

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The answer as it comes, one choice a chunk; the usage, where asked for, is a last chunk without choices."""
        cursors = self._cursors(generation)
        for index in range(len(cursors)):
            for opening in self._opening():
                yield self._chunk(opening | {"index": index})
        async for prompt, output in generation:
            for choice in output.outputs:
                index = prompt * generation.params.n + choice.index
                if (part := cursors[index].advance(choice)) is not None:
                    yield self._chunk(self._delta(part, cursors[index].logprobs) | {"index": index})
        if self._include_usage:
            body = {"object": self.chunk_object, "choices": [], "usage": generation.usage()}
            yield to_json(self._head | body)

    def _opening(self) -> list[Json]:
        return []

    def _choice(self, output: CompletionOutput, logprobs: Logprobs | None) -> Json:
        found = logprobs.completion(output) if logprobs else None
        return {"text": output.text, "logprobs": found, "finish_reason": output.finish_reason}

    def _delta(self, part: CompletionOutput, logprobs: Logprobs | None) -> Json:
        return self._choice(part, logprobs)

    def _chunk(self, choice: Json) -> bytes:
        usage: Json = {"usage": None} if self._include_usage else {}
        return to_json(self._head | {"object": self.chunk_object, "choices": [choice]} | usage)

    def _cursors(self, generation: Generation) -> list[Cursor]:
        params = generation.params

        def logprobs() -> Logprobs | None:
            if params.logprobs is None:
                return None
            return Logprobs(self._tokenizer, params.logprobs, params.skip_special_tokens, self._opens)

        return [Cursor(logprobs()) for _ in range(len(generation.outputs) * params.n)]


class ChatAnswer(Answer):
    """The answer to one call of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"delta": delta, "logprobs": None, "finish_reason": None}]

    def _choice(self, output: CompletionOutput, logprobs: Logprobs | None) -> Json:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        found = logprobs.chat(output) if logprobs else None
        return {"message": message, "logprobs": found, "finish_reason": output.finish_reason}

    def _delta(self, part: CompletionOutput, logprobs: Logprobs | None) -> Json:
        delta = {"content": part.text} if part.text else {}
        found = logprobs.chat(part) if logprobs else None
        return {"delta": delta, "logprobs": found, "finish_reason": part.finish_reason}
