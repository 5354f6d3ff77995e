"""One request as the scheduler knows it: its tokens, how many of them are computed, and the blocks that hold them.

The scheduling rule is written in two numbers: `num_computed_tokens` catches up with `num_tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from ... import RequestError
from .sampling import SamplingParams
from .structured import Matcher

FinishReason = Literal["stop", "length", "abort"]
_NONE: frozenset[int] = frozenset()


class QueueFullError(RequestError):
    """The waiting queue is full: try again later (HTTP 429)."""


class Status(Enum):
    """Where a request stands: a held one may not start yet, a preempted one waits again without keys and values."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to complete; a request for n choices is n of these, `choice` 0 to n - 1, with different ids.

    The caller sets the first block of fields. The rest is state that only the scheduler and the block manager write.

    Args:
        id: unique among the scheduler's live requests.
        prompt_token_ids: at least one token.
        params: how to sample; `params.n` is the caller's business.
        arrival: seconds on the scheduler's clock.
        priority: lower is served earlier (vLLM's meaning); within one priority first come, first served.
        eos_token_ids: the model's end-of-sequence tokens.
        choice: which of the n choices this is.
        cache_salt: requests share cached prefixes only with requests of the same salt.
        encoder_token_ids: what an encoder reads first, whole, in the step in which the request starts; the prompt is
            then what the decoder begins with. None without an encoder.
        seed: the 64-bit key of its random numbers.
        deadline: on the scheduler's clock; if it has not started until then it expires. None = never.
        parent: the choice of the same prompt that computes it; this one waits for it and then takes over its blocks.
        grammar: what the text must match, once it is compiled.
    """

    id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    arrival: float = 0.0
    priority: int = 0
    eos_token_ids: frozenset[int] = _NONE
    choice: int = 0
    cache_salt: str = ""
    encoder_token_ids: Sequence[int] | None = None
    seed: int = 0
    deadline: float | None = None
    parent: "Request | None" = None
    grammar: Matcher | None = None

    status: Status = field(default=Status.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    token_ids: list[int] = field(init=False)
    """The prompt's and all sampled tokens."""
    stop_ids: frozenset[int] = field(init=False)
    """Tokens that end the request: its stop tokens and, unless ignored, the end-of-sequence tokens."""
    max_tokens: int = field(default=0, init=False)
    """`params.max_tokens`, or what the context leaves; set at admission to the queue."""
    num_computed_tokens: int = field(default=0, init=False)
    """Leading tokens whose keys and values are in the cache."""
    num_launched_tokens: int = field(default=0, init=False)
    """Those and the ones that launched steps compute."""
    num_pending_tokens: int = field(default=0, init=False)
    """1 when a launched step samples its next token, which nobody knows yet."""
    num_cached_tokens: int = field(default=0, init=False)
    """Prompt tokens found in the prefix cache when it first started; resuming after preemption does not count."""
    num_reported_tokens: int = field(default=0, init=False)
    """Leading tokens whose experts its caller has; the engine's, for requests that ask."""
    num_preemptions: int = field(default=0, init=False)
    started: float = field(default=0.0, init=False)
    """When it first left the queue, on the scheduler's clock; 0 = it has not."""
    first_token: float = field(default=0.0, init=False)
    """When its first token was there, on the same clock; 0 = it is not. The engine's, like the next."""
    last_token: float = field(default=0.0, init=False)
    order: int = field(default=-1, init=False)
    """Its place in the order of arrival at the scheduler."""
    in_flight: int = field(default=0, init=False)
    """Launched steps that it is in, which may still read and write its blocks."""
    block_table: list[int] = field(default_factory=list, init=False)
    """Block i holds tokens i * block_size onwards. It changes only in `schedule`, `commit`, `abort` and `finish`."""
    block_hashes: list[bytes] = field(default_factory=list, init=False)
    """Hash chain of the full blocks of `token_ids`, as far as it was needed."""
    num_published_blocks: int = field(default=0, init=False)
    """Leading blocks of the table that are in the prefix cache."""
    num_dropped_blocks: int = field(default=0, init=False)
    """Leading entries of the table that are the null block: a window has left them, and they were given back."""
    replaced_blocks: list[int] = field(default_factory=list, init=False)
    """Blocks that the table had when a step was launched that still runs, and has no more."""
    copied_block: int | None = field(default=None, init=False)
    """The parent's last, partly filled block, to be copied in the step in which it starts."""
    suspect: bool = field(default=False, init=False)
    """A step that it was in has failed; it runs alone until it has caught up with its tokens."""
    held_by: set[str] = field(default_factory=set, init=False)
    """What a held request waits for."""
    root: bytes = field(default=b"", init=False)
    """Hash of what all its keys and values depend on besides its tokens, once it was needed."""
    memory_table: tuple[int, ...] = field(default=(), init=False)
    """Block i holds what cross-attention reads of encoder tokens i * block_size onwards; equal inputs share it."""
    num_unencoded_tokens: int = field(default=0, init=False)
    """Encoder tokens to compute in the step in which it starts: all, or none when a live request has done it."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        stops = frozenset(self.params.stop_token_ids or ())
        self.stop_ids = stops if self.params.ignore_eos else stops | self.eos_token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def continues(self) -> bool:
        """Something is left to compute after the launched steps, as far as is known."""
        if self.num_pending_tokens:
            return self.num_output_tokens + 1 < self.max_tokens
        return self.num_launched_tokens < self.num_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The sampled tokens (a copy)."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def rank(self) -> tuple[int, int]:
        """The order of service; the largest rank is the first victim of preemption."""
        return self.priority, self.order

    def append(self, token: int) -> FinishReason | None:
        """Take a sampled token and say whether it ends the request."""
        self.token_ids.append(token)
        count = self.num_output_tokens
        if token in self.stop_ids and count > self.params.min_tokens:
            return "stop"
        if self.grammar is not None and self.grammar.accept(token):
            return "stop"
        return "length" if count >= self.max_tokens else None
