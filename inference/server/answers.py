"""The engine's outputs as OpenAI's response objects, whole or in chunks."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace

from ..outputs import CompletionOutput, RequestOutput
from ..text.tokenizer import TextTokenizer
from .echo import Echo
from .errors import to_json
from .generation import Generation
from .logprobs import Json, Logprobs, prompt_logprobs
from .protocol import GenerationRequest


class Cursor:
    """How much of one choice has been sent.

    Args:
        logprobs: where they are asked for.
        plain: a chunk may bring text and nothing else.
    """

    def __init__(self, logprobs: Logprobs | None, plain: bool) -> None:
        self.logprobs = logprobs
        self._plain = plain and logprobs is None
        self._chars = 0
        self._tokens = 0
        self._rows = 0
        self._finished = False

    def text(self, output: CompletionOutput) -> str | None:
        """What is new in the cumulative `output` where that is text and nothing else; otherwise `advance` tells."""
        if not self._plain or output.finish_reason is not None or output.routed_experts is not None:
            return None
        new = output.text[self._chars :]
        self._chars += len(new)
        return new

    def advance(self, output: CompletionOutput) -> CompletionOutput | None:
        """What is new in the cumulative `output`, or None when there is nothing to send."""
        part = replace(
            output,
            text=output.text[self._chars :],
            token_ids=output.token_ids[self._tokens :],
            logprobs=None if output.logprobs is None else output.logprobs[self._tokens :],
            routed_experts=None if output.routed_experts is None else output.routed_experts[self._rows :],
        )
        silent = not part.text and part.finish_reason is None and not (part.token_ids and self.logprobs)
        if self._finished or silent:
            return None
        self._chars, self._tokens = len(output.text), len(output.token_ids)
        self._rows = 0 if output.routed_experts is None else len(output.routed_experts)
        self._finished = part.finish_reason is not None
        return part


class Answer:
    """The answer to one call of `/v1/completions`; `ChatAnswer` overrides what chats spell differently.

    Args:
        asked: the request.
        tokenizer: spells tokens of log-probabilities.
        opens: a completion begins a text instead of going on with the prompt's (encoder-decoders).
        echo: every choice begins with its prompt.
    """

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"
    plain = True
    """Text is sent as it comes."""

    def __init__(self, asked: GenerationRequest, tokenizer: TextTokenizer, opens: bool, *, echo: bool = False) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": asked.model}
        self._asked = asked
        self._tokenizer = tokenizer
        self._include_usage = asked.include_usage
        self._opens = opens or echo
        self._echo = echo
        self._echoes: dict[int, Echo] = {}

    def whole(self, generation: Generation) -> bytes:
        """The answer of a finished generation."""
        cursors = self._cursors(generation)
        choices = []
        for prompt, output in enumerate(generation.outputs):
            for choice in output.outputs if output is not None else ():
                assert output is not None
                index = prompt * generation.params.n + choice.index
                shown = self._shown(prompt, output, choice, cursors[index])
                spelled = self._choice(shown, cursors[index].logprobs) | {"index": index}
                choices.append(spelled | self._scored(output) | _routed(choice) | self._ids(shown))
        body = {"object": self.whole_object, "choices": choices, "usage": generation.usage()}
        return to_json(self._head | body | self._scores(generation))

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The answer as it comes, one choice a chunk; the usage, where asked for, is a last chunk without choices."""
        cursors = self._cursors(generation)
        for index in range(len(cursors)):
            for opening in self._opening():
                yield self._chunk(opening | {"index": index})
        plain = [self._around(index) for index in range(len(cursors))]
        told: set[int] = set()
        async for prompt, output in generation:
            for choice in output.outputs:
                cursor = cursors[index := prompt * generation.params.n + choice.index]
                shown = self._shown(prompt, output, choice, cursor)
                if (text := cursor.text(shown)) is not None:
                    if text:
                        head, tail = plain[index]
                        yield head + to_json(text) + tail
                elif (part := cursor.advance(shown)) is not None:
                    once = {} if index in told else self._scored(output)
                    more = {"index": index} | _routed(part) | self._ids(part) | once
                    for delta in self._deltas(part, index, cursor.logprobs):
                        yield self._chunk(delta | more, {} if told else self._scores(generation))
                        told.add(index)
                        more = {"index": index}
        if self._include_usage:
            body = {"object": self.chunk_object, "choices": [], "usage": generation.usage()}
            yield to_json(self._head | body)

    def _shown(self, prompt: int, output: RequestOutput, choice: CompletionOutput, cursor: Cursor) -> CompletionOutput:
        """The choice as its caller sees it: with `echo` behind the prompt."""
        if not self._echo:
            return choice
        if prompt not in self._echoes:
            self._echoes[prompt] = Echo(self._tokenizer, output, self._asked.skip_special_tokens)
        echo = self._echoes[prompt]
        if cursor.logprobs is not None:
            cursor.logprobs.echo = echo
        return echo.before(choice, output)

    def _scored(self, output: RequestOutput) -> Json:
        """What is asked of the prompt, tokens and log-probabilities, where vLLM has it in every choice."""
        found: Json = {"prompt_token_ids": output.prompt_token_ids} if self._asked.return_token_ids else {}
        if self._asked.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output)
        return found

    def _scores(self, generation: Generation) -> Json:
        """The same where it has them once."""
        return {}

    def _opening(self) -> list[Json]:
        return []

    def _choice(self, output: CompletionOutput, logprobs: Logprobs | None) -> Json:
        found = logprobs.completion(output) if logprobs else None
        return {"text": output.text, "logprobs": found, "finish_reason": output.finish_reason}

    def _delta(self, part: CompletionOutput, logprobs: Logprobs | None) -> Json:
        return self._choice(part, logprobs)

    def _deltas(self, part: CompletionOutput, index: int, logprobs: Logprobs | None) -> list[Json]:
        """What a part of the choice `index` is in chunks."""
        return [self._delta(part, logprobs)]

    def _ids(self, part: CompletionOutput) -> Json:
        """The tokens of what is sent, if they were asked for."""
        return {"token_ids": part.token_ids} if self._asked.return_token_ids else {}

    def _chunk(self, choice: Json, more: Json | None = None) -> bytes:
        usage: Json = {"usage": None} if self._include_usage else {}
        return to_json(self._head | {"object": self.chunk_object, "choices": [choice]} | usage | (more or {}))

    def _around(self, index: int) -> tuple[bytes, bytes]:
        """A chunk that brings text and nothing else: what stands before its text and what behind it."""
        mark = uuid.uuid4().hex
        delta = self._delta(CompletionOutput(index=index, text=mark, token_ids=[]), None)
        head, tail = self._chunk(delta | {"index": index}).split(to_json(mark))
        return head, tail

    def _cursors(self, generation: Generation) -> list[Cursor]:
        params = generation.params

        def logprobs() -> Logprobs | None:
            if params.logprobs is None:
                return None
            return Logprobs(self._tokenizer, params.logprobs, params.skip_special_tokens, self._opens)

        plain = self.plain and not self._asked.return_token_ids
        return [Cursor(logprobs(), plain) for _ in range(len(generation.outputs) * params.n)]


class ChatAnswer(Answer):
    """The answer to one call of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [{"delta": delta, "logprobs": None, "finish_reason": None}]

    def _scored(self, output: RequestOutput) -> Json:
        return {}

    def _scores(self, generation: Generation) -> Json:
        (output,) = generation.outputs
        return {} if output is None else super()._scored(output)

    def _choice(self, output: CompletionOutput, logprobs: Logprobs | None) -> Json:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        found = logprobs.chat(output) if logprobs else None
        return {"message": message, "logprobs": found, "finish_reason": output.finish_reason}

    def _delta(self, part: CompletionOutput, logprobs: Logprobs | None) -> Json:
        delta = {"content": part.text} if part.text else {}
        found = logprobs.chat(part) if logprobs else None
        return {"delta": delta, "logprobs": found, "finish_reason": part.finish_reason}


def _routed(choice: CompletionOutput) -> Json:
    """Where the choice's tokens went, if it was asked for."""
    if choice.routed_experts is None:
        return {}
    return {"routed_experts": choice.routed_experts.tolist()}
