"""What the engine hands out, under vLLM's names. Every output is cumulative: all text and tokens so far."""

from dataclasses import dataclass

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
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, float] | None] | None = None


@dataclass(frozen=True, slots=True)
class FailedOutput(RequestOutput):
    """The last output of a request that could not be finished: `error` says why, unfinished choices are "abort"."""

    error: TurnoutError | None = None
