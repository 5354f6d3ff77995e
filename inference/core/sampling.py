"""How a request wants its tokens chosen: vLLM's names and meanings, validated at birth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ... import RequestError

MAX_CHOICES = 128
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling parameters.

    Args:
        n: completions of the prompt, each a choice with random numbers of its own.
        temperature: divides the logits; 0 = greedy.
        top_k: keep the k most probable tokens; 0 or -1 = all.
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        max_tokens: tokens to generate at most; None = up to the engine's `max_model_len`.
        min_tokens: end-of-sequence, stop tokens and stop strings are suppressed until so many tokens are out.
        stop: a string or strings that end the text; kept as a tuple.
        stop_token_ids: tokens that end the text; kept as a tuple.
        ignore_eos: generate past the end-of-sequence token.
        seed: key of this request's random numbers; None = the engine's.
        logprobs: how many of the most probable tokens to report beside the sampled one; None = no log-probabilities.
        include_stop_str_in_output: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
        routed_experts: report the experts of every computed token, prompt and completion.

    Raises:
        RequestError: a value out of range or of the wrong type; `param` names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    routed_experts: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self._tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", self._tuple("stop_token_ids", self.stop_token_ids))
        self._integer("n", self.n, 1, MAX_CHOICES)
        self._number("temperature", self.temperature, "at least 0")
        self._number("top_p", self.top_p, "in (0, 1]")
        if self.top_p == 0 or self.top_p > 1:
            raise RequestError(f"top_p ({self.top_p!r}) must be a number in (0, 1]", "top_p")
        self._integer("top_k", self.top_k, -1)
        if self.max_tokens is not None:
            self._integer("max_tokens", self.max_tokens, 1)
        self._integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )
        for text in stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop ({text!r}) must be text of at least one character", "stop")
        for token in self.stop_token_ids or ():
            self._integer("stop_token_ids", token, 0)
        if self.seed is not None:
            self._integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            self._integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "routed_experts"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} ({getattr(self, name)!r}) must be true or false", name)

    @property
    def needs_history(self) -> bool:
        """The next token can not be chosen before the last one is known here: no step may be scheduled ahead of it."""
        return False

    @property
    def reads_prefix(self) -> bool:
        """Whether tokens that are in the prefix cache need not be computed."""
        return True

    @staticmethod
    def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
            rule = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise RequestError(f"{name} ({value!r}) must be a whole number {rule}", name)

    @staticmethod
    def _number(name: str, value: object, rule: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise RequestError(f"{name} ({value!r}) must be a number {rule}", name)

    @staticmethod
    def _tuple(name: str, value: object) -> tuple[object, ...]:
        if value is not None and not isinstance(value, list | tuple):
            raise RequestError(f"{name} ({value!r}) must be a list", name)
        return tuple(value or ())
