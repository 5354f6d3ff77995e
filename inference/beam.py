"""Beam search: the best completions of a prompt by summed log-probability, as transformers' `generate` finds them.

A search is a policy over log-probabilities: it names the sequences whose next tokens it wants to know and takes their
most probable ones. `LLM.beam_search` runs them as ordinary requests of one token, so beams share their common prefix
through the prefix cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .. import RequestError
from .core.request import FinishReason
from .core.sampling import MAX_LOGPROBS, integer, number


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """One beam search.

    Args:
        beam_width: sequences kept at every step, and returned.
        max_tokens: tokens to generate at most.
        ignore_eos: generate past the end-of-sequence token.
        length_penalty: a finished sequence of L generated tokens scores sum / L ** length_penalty; above 0 favours
            long ones.
        early_stopping: when to stop with `beam_width` sequences finished: True = at once; False = when the best
            running one would not make it at its present length; "never" = when it can not make it at any length.

    Raises:
        RequestError: a value out of range or of the wrong type; `param` names it.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        integer("beam_width", self.beam_width, 1, MAX_LOGPROBS)
        integer("max_tokens", self.max_tokens, 1)
        number("length_penalty", self.length_penalty, -10, 10)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos ({self.ignore_eos!r}) must be true or false", "ignore_eos")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            rule = 'must be true, false or "never"'
            raise RequestError(f"early_stopping ({self.early_stopping!r}) {rule}", "early_stopping")


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One sequence of a search.

    Args:
        tokens: prompt and completion, a final end-of-sequence token included.
        cum_logprob: summed log-probability of the completion in nats.
        score: what sequences are ranked by, `cum_logprob / L ** length_penalty`.
        text: of all its tokens.
        finish_reason: "stop" at an end-of-sequence token, "length" at `max_tokens`.
    """

    tokens: tuple[int, ...]
    cum_logprob: float = 0.0
    score: float = -math.inf
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The finished sequences of one prompt, best first, at most `beam_width` of them."""

    sequences: list[BeamSearchSequence]


class BeamSearch:
    """The search of one prompt.

    Args:
        prompt: its tokens.
        params: how to search.
        eos: end-of-sequence tokens; empty when they are ignored.

    Attributes:
        running: what is still growing, best first: `advance` wants the next tokens of each.
        finished: the best finished sequences so far, best first.
        top: how many of the most probable next tokens it needs of each: as many as may run on, and those that end.
    """

    def __init__(self, prompt: Sequence[int], params: BeamSearchParams, eos: frozenset[int]) -> None:
        self.params = params
        self.top = params.beam_width + len(eos)
        self.running = [BeamSearchSequence(tokens=tuple(prompt))]
        self.finished: list[BeamSearchSequence] = []
        self._prompt = len(prompt)
        self._eos = eos

    def advance(self, found: Sequence[dict[int, float]]) -> None:
        """Take the log-probabilities of the most probable next tokens of each running sequence, in their order."""
        width = self.params.beam_width
        grown = [
            self._grow(beam, token, logprob)
            for beam, logprobs in zip(self.running, found, strict=True)
            for token, logprob in logprobs.items()
            if logprob > -math.inf
        ]
        grown.sort(key=lambda beam: -beam.cum_logprob)  # stable: ties stay in the order of beams and of their tokens
        ended = [beam for beam in grown[:width] if beam.finish_reason is not None]
        if not (self._full and self.params.early_stopping is True):
            self.finished = sorted(self.finished + ended, key=lambda beam: -beam.score)[:width]
        self.running = [beam for beam in grown if beam.finish_reason is None][:width]
        if self._full and not self._promising:
            self.running = []

    @property
    def _full(self) -> bool:
        return len(self.finished) == self.params.beam_width

    @property
    def _promising(self) -> bool:
        """Whether a running sequence may still beat the worst finished one (a heuristic unless "never" is asked)."""
        if not self.running or self.params.early_stopping is True:
            return False
        penalty = self.params.length_penalty
        reach = self.params.early_stopping == "never" and penalty > 0
        length = self.params.max_tokens if reach else len(self.running[0].tokens) - self._prompt
        return self.running[0].cum_logprob / length**penalty > self.finished[-1].score

    def _grow(self, beam: BeamSearchSequence, token: int, logprob: float) -> BeamSearchSequence:
        total, length = beam.cum_logprob + logprob, len(beam.tokens) - self._prompt + 1
        at_end = length == self.params.max_tokens
        reason: FinishReason | None = "stop" if token in self._eos else "length" if at_end else None
        score = total / length**self.params.length_penalty
        return BeamSearchSequence((*beam.tokens, token), total, score, "", reason)
