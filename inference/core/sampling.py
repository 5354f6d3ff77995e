"""How a request wants its tokens chosen: vLLM's names and meanings, validated at birth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from ... import RequestError
from .structured import StructuredOutputs

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
"""OpenAI's bound of a bias, in nats."""
PENALTIES = (0.01, 100.0)
"""Bounds of `repetition_penalty`, so that no product with a float32 logit overflows."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling parameters.

    Args:
        n: completions of the prompt, each a choice with random numbers of its own.
        temperature: divides the logits; 0 = greedy.
        top_k: keep the k most probable tokens; 0 or -1 = all.
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        min_p: keep the tokens with at least this share of the most probable one's probability, in [0, 1].
        repetition_penalty: tokens of prompt and output have positive logits divided and negative ones multiplied by
            it; 1 = none (Keskar et al. 2019).
        presence_penalty: taken off the logits of the output's tokens, in [-2, 2].
        frequency_penalty: taken off as often as a token is in the output, in [-2, 2].
        logit_bias: token id → what is added to its logit, in [-100, 100]; kept as a dict.
        bad_words: texts that must not come; token by token, as the tokenizer spells them with and without a blank
            before; kept as a tuple.
        bad_token_ids: token ids, or sequences of them, that must not come; kept as a tuple of sequences.
        allowed_token_ids: the only tokens that may come; None = all; kept as a tuple.
        max_tokens: tokens to generate at most; None = up to the engine's `max_model_len`; 0 = none, to score the
            prompt (`prompt_logprobs`).
        min_tokens: end-of-sequence, stop tokens and stop strings are suppressed until so many tokens are out.
        stop: a string or strings that end the text; kept as a tuple.
        stop_token_ids: tokens that end the text; kept as a tuple.
        ignore_eos: generate past the end-of-sequence token.
        seed: key of this request's random numbers; None = the engine's.
        logprobs: how many of the most probable tokens to report beside the sampled one; None = no log-probabilities.
        prompt_logprobs: the same for every prompt token but the first; such a request reads no cached prefix.
        include_stop_str_in_output: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
        routed_experts: report the experts of every computed token, prompt and completion.
        structured_outputs: what the text must look like. A token that ends the request may then come only where the
            text is whole, and a whole text that nothing can follow ends it, also below `min_tokens`.

    Raises:
        RequestError: a value out of range or of the wrong type; `param` names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    bad_token_ids: Sequence[int | Sequence[int]] | None = None
    allowed_token_ids: Sequence[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    routed_experts: bool = False
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "bad_words", _tuple("bad_words", self.bad_words))
        integer("n", self.n, 1, MAX_CHOICES)
        self._check_shape()
        self._check_words()
        self._check_lengths()
        if self.seed is not None:
            integer("seed", self.seed, 0, 2**64 - 1)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "routed_experts"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} ({getattr(self, name)!r}) must be true or false", name)
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            kind = type(self.structured_outputs).__name__
            rule = "must be StructuredOutputs: wrap it"
            raise RequestError(f"structured_outputs ({kind}) {rule}", "structured_outputs")

    @cached_property
    def leaves_logits(self) -> bool:
        """Tokens are chosen by the model's logits as they are, unless a grammar forbids some."""
        words = self.bad_sequences or self.logit_bias or self.allowed_token_ids is not None
        return not (words or self.min_tokens or self.penalised)

    @property
    def penalised(self) -> bool:
        """The logits depend on which tokens came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def reads_prefix(self) -> bool:
        """Whether tokens that are in the prefix cache need not be computed."""
        return self.prompt_logprobs is None

    @property
    def needs_history(self) -> bool:
        """The next token can not be chosen before the last one is known here: no step may be scheduled ahead of it."""
        listed = bool(self.bad_words) or any(len(ids) > 1 for ids in self.bad_sequences)
        return self.penalised or listed or self.structured_outputs is not None

    @property
    def bad_sequences(self) -> tuple[tuple[int, ...], ...]:
        """`bad_token_ids` as they are kept."""
        return cast("tuple[tuple[int, ...], ...]", self.bad_token_ids)

    def _check_shape(self) -> None:
        """What forms the distribution, token for token alike."""
        number("temperature", self.temperature, 0)
        integer("top_k", self.top_k, -1)
        number("top_p", self.top_p, 0, 1, "in (0, 1]")
        if self.top_p == 0:
            raise RequestError(f"top_p ({self.top_p!r}) must be a number in (0, 1]", "top_p")
        number("min_p", self.min_p, 0, 1)
        number("repetition_penalty", self.repetition_penalty, *PENALTIES)
        number("presence_penalty", self.presence_penalty, -2, 2)
        number("frequency_penalty", self.frequency_penalty, -2, 2)

    def _check_words(self) -> None:
        """What concerns single tokens and texts."""
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text:
                    raise RequestError(f"{name} ({text!r}) must be text of at least one character", name)
        for token in self.stop_token_ids or ():
            integer("stop_token_ids", token, 0)
        bad = _tuple("bad_token_ids", self.bad_token_ids)
        bad = tuple(_tuple("bad_token_ids", ids) if isinstance(ids, list | tuple) else (ids,) for ids in bad)
        object.__setattr__(self, "bad_token_ids", bad)
        for ids in self.bad_sequences:
            if not ids:
                raise RequestError("bad_token_ids (()) must hold sequences of at least one token", "bad_token_ids")
            for token in ids:
                integer("bad_token_ids", token, 0)
        if self.allowed_token_ids is not None:
            allowed = _tuple("allowed_token_ids", self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
            if not allowed:
                raise RequestError("allowed_token_ids ([]) must hold at least one token", "allowed_token_ids")
            for token in allowed:
                integer("allowed_token_ids", token, 0)
            if {ids[0] for ids in self.bad_sequences if len(ids) == 1}.issuperset(allowed):
                rule = "must leave a token that bad_token_ids do not exclude"
                raise RequestError(f"allowed_token_ids ({list(allowed)}) {rule}", "allowed_token_ids")
        if not isinstance(self.logit_bias, Mapping | None):
            raise RequestError(f"logit_bias ({self.logit_bias!r}) must map token ids to numbers", "logit_bias")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        for token, bias in (self.logit_bias or {}).items():
            integer("logit_bias", token, 0)
            number("logit_bias", bias, -MAX_BIAS, MAX_BIAS)

    def _check_lengths(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is None:
            return
        integer("max_tokens", self.max_tokens, 0)
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens (0) must be at least 1 unless prompt_logprobs asks for a score", "max_tokens"
            )
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )


def integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise RequestError unless `value` is a whole number in [low, high]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not low <= value <= (math.inf if high is None else high)
    ):
        rule = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise RequestError(f"{name} ({value!r}) must be a whole number {rule}", name)


def number(name: str, value: object, low: float, high: float | None = None, rule: str | None = None) -> None:
    """Raise RequestError unless `value` is a finite number in [low, high]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= (math.inf if high is None else high)
        or value == math.inf
    ):
        rule = rule or (f"of at least {low}" if high is None else f"from {low} to {high}")
        raise RequestError(f"{name} ({value!r}) must be a number {rule}", name)


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if value is not None and not isinstance(value, list | tuple):
        raise RequestError(f"{name} ({value!r}) must be a list", name)
    return tuple(value or ())
