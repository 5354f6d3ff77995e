"""Log-probabilities as OpenAI's and vLLM's response objects."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..outputs import CompletionOutput, RequestOutput
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import TextTokenizer
from .echo import Echo

SMALLEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON can not carry

Json = dict[str, Any]


class Logprobs:
    """Log-probabilities of one choice in OpenAI's two forms; it remembers where in the text the next token starts.

    Attributes:
        echo: the prompt, when the choice's text and tokens begin with it.
    """

    def __init__(self, tokenizer: TextTokenizer, top: int, skip_special_tokens: bool, opens: bool) -> None:
        self.echo: Echo | None = None
        self._tokenizer = tokenizer
        self._top = top
        self._skip = skip_special_tokens
        self._detokenizer = Detokenizer(tokenizer, (), skip_special_tokens, opens)
        self._offset = 0
        self._tokens = 0

    def completion(self, part: CompletionOutput) -> Json:
        """The form of `/v1/completions`; text_offset counts characters of the choice's text."""
        rows = list(self._rows(part))
        return {
            "tokens": [spell(self._tokenizer, token) for token, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [
                None if logprob is None else self._by_name([*top, (token, logprob)]) for token, logprob, top in rows
            ],
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

    def _rows(self, part: CompletionOutput) -> Iterator[tuple[int, float | None, list[tuple[int, float]]]]:
        """(token, its log-probability, the most probable ones in order) of each new token; a first one has none."""
        for token, found in zip(part.token_ids, part.logprobs or (), strict=True):
            if found is None:
                yield token, None, []
                continue
            best = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[: self._top]
            yield token, finite(found[token]), [(other, finite(logprob)) for other, logprob in best]

    def _by_name(self, top: list[tuple[int, float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in top:
            found.setdefault(spell(self._tokenizer, token), logprob)
        return found

    def _entry(self, token: int, logprob: float | None) -> Json:
        data = self._tokenizer.token_bytes(token)
        return {"token": spell(self._tokenizer, token), "logprob": logprob, "bytes": list(data)}

    def _advance(self, token: int) -> int:
        """Where the token's text begins; it may also bring the last byte of a character before it."""
        if self.echo is not None and self._tokens == len(self.echo.ids):
            self._detokenizer = Detokenizer(self._tokenizer, self.echo.ids, self._skip)
            self._offset = len(self.echo.text)
        self._tokens += 1
        piece, name, start = self._detokenizer.push(token), spell(self._tokenizer, token), self._offset
        self._offset += len(piece)
        return self._offset - len(name) if piece.endswith(name) else start


def prompt_logprobs(tokenizer: TextTokenizer, output: RequestOutput) -> list[Json | None]:
    """vLLM's form: token id → its log-probability and text, for every prompt token but the first."""

    def form(found: Mapping[int, float]) -> Json:
        return {
            str(token): {"logprob": finite(logprob), "decoded_token": spell(tokenizer, token)}
            for token, logprob in found.items()
        }

    return [None if found is None else form(found) for found in output.prompt_logprobs or ()]


def spell(tokenizer: TextTokenizer, token: int) -> str:
    """The token's text, or OpenAI's spelling of bytes that are no text."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """The log-probability as JSON can carry it."""
    return max(logprob, SMALLEST_LOGPROB)
