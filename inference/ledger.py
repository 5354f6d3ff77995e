"""Who has asked for what and has got so far: an engine's live requests and their choices."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .. import RequestError, TurnoutError
from ..moe.config import ModelConfig
from .choice import Choice
from .core.request import Request
from .outputs import FailedOutput, RequestOutput, RequestStats
from .prepare import Prepared
from .routed import RoutedExperts
from .text.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A live request: its choices, by index."""

    prepared: Prepared
    choices: tuple[Choice, ...]


class Ledger:
    """The live requests by their callers' ids, and every choice by its scheduler request's.

    Args:
        model: its end-of-sequence tokens, and what its decoder begins with.
        tokenizer: the model's.
        seed: key of the random numbers of requests that bring none.
        shares: whether choices may take over one another's blocks.
        no_rows: [0, L, K], of the type in which routed experts are reported.

    Attributes:
        choices: scheduler request id → its choice.
    """

    def __init__(
        self, model: ModelConfig, tokenizer: TextTokenizer, seed: int, *, shares: bool, no_rows: np.ndarray
    ) -> None:
        self.choices: dict[str, Choice] = {}
        self._entries: dict[str, _Entry] = {}
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._shares, self._no_rows = shares, no_rows
        self._eos = frozenset(model.eos_token_ids)
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def requests(self, prepared: Prepared, now: float) -> list[Request]:
        """One scheduler request a choice; all but the first take over the first one's prompt.

        Raises:
            RequestError: the id is taken.
        """
        name, params, encoder = prepared.request_id, prepared.params, self._model.encoder
        if name in self:
            raise RequestError(f"request_id ({name!r}) must be new among live requests: choose another", "request_id")
        requests: list[Request] = []
        for choice in range(params.n):
            request = Request(
                id=f"{name}#{choice}",
                prompt_token_ids=prepared.prompt_token_ids if encoder is None else (encoder.start_token_id,),
                encoder_token_ids=None if encoder is None else prepared.prompt_token_ids,
                params=params,
                arrival=now,
                priority=prepared.priority,
                eos_token_ids=self._eos,
                choice=choice,
                cache_salt=prepared.cache_salt,
                seed=self._own_seed() if params.seed is None else params.seed,
                deadline=None if prepared.deadline is None else now + prepared.deadline,
                parent=requests[0] if requests and encoder is None and self._shares else None,
            )
            requests.append(request)
        return requests

    def enter(self, prepared: Prepared, requests: list[Request]) -> None:
        """From now on the request lives."""
        self._arrivals += 1
        choices = tuple(self._choice(prepared.request_id, request) for request in requests)
        self._entries[prepared.request_id] = _Entry(prepared=prepared, choices=choices)
        self.choices.update((choice.request.id, choice) for choice in choices)

    def choices_of(self, name: str) -> tuple[Choice, ...]:
        """The choices of a live request, by index."""
        return self._entries[name].choices

    def output(self, name: str, error: TurnoutError | None = None) -> RequestOutput:
        """A live request's state for its caller; a finished one is forgotten."""
        entry = self._entries[name]
        finished = all(choice.finish_reason is not None for choice in entry.choices)
        if finished:
            del self._entries[name]
            for choice in entry.choices:
                del self.choices[choice.request.id]
        first, scored = entry.choices[0], None
        if first.request.params.prompt_logprobs is not None:
            complete = len(first.prompt_logprobs) == len(first.request.prompt_token_ids)
            scored = first.prompt_logprobs if complete else None
        state = (
            name,
            entry.prepared.prompt,
            list(entry.prepared.prompt_token_ids),
            [choice.output() for choice in entry.choices],
            finished,
            first.request.num_cached_tokens,
            scored,
            _stats(entry.choices),
        )
        return RequestOutput(*state) if error is None else FailedOutput(*state, error)

    def _choice(self, name: str, request: Request) -> Choice:
        routed = RoutedExperts(self._no_rows) if request.params.routed_experts else None
        return Choice(name, request, self._tokenizer, routed)

    def _own_seed(self) -> int:
        """The key of a request without a seed: the engine's seed and how many requests came before it."""
        key = f"{self._seed}/{self._arrivals}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")


def _stats(choices: tuple[Choice, ...]) -> RequestStats:
    first = choices[0].request
    if len(choices) == 1:
        return RequestStats(first.arrival, first.started, first.first_token, first.last_token)
    begun = [choice.request.first_token for choice in choices if choice.request.first_token]
    newest = max(choice.request.last_token for choice in choices)
    return RequestStats(first.arrival, first.started, min(begun, default=0.0), newest)
