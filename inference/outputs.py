"""What the engine hands out, under vLLM's names. Every output is cumulative: all text and tokens so far."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .. import TurnoutError
from .core.request import FinishReason


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice of a request.

    Args:
        index: the choice, 0 to n - 1.
        text: the completion so far.
        token_ids: its tokens so far, a final end-of-sequence token included.
        logprobs: one dict a token, token id → log-probability in nats; None unless asked for.
        finish_reason: None while it runs.
        routed_experts: int [rows, MoE layers of the decoder, k], a row for every computed token, the prompt's first, so
            prompt + output - 1 of them; the logical expert of each choice, or −1 − expert where the choice went
            nowhere, because it was dropped or GShard's second was not wanted. None unless asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason | None = None
    routed_experts: np.ndarray | None = None


class RequestStats(NamedTuple):
    """When what happened to a request, in seconds on the engine's clock; 0 = it has not happened yet.

    Args:
        queued_ts: it came to the engine.
        scheduled_ts: its first choice left the queue.
        first_token_ts: the first token of any choice was there.
        last_token_ts: so was the newest.
    """

    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0


NOTHING_YET = RequestStats()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request and its choices.

    Args:
        request_id: the caller's id.
        prompt: the prompt's text; None when it came as tokens.
        prompt_token_ids: the prompt's tokens, which an encoder reads where there is one.
        outputs: one for each choice, by index.
        finished: every choice has its finish reason.
        num_cached_tokens: prompt tokens that the prefix cache had when the request started.
        prompt_logprobs: one dict a prompt token, token id → log-probability in nats, but None for the first; None
            unless asked for, and until the whole prompt is computed.
        metrics: when what happened.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, float] | None] | None = None
    metrics: RequestStats = NOTHING_YET


@dataclass(frozen=True, slots=True)
class FailedOutput(RequestOutput):
    """The last output of a request that could not be finished: `error` says why, unfinished choices are "abort"."""

    error: TurnoutError | None = None
