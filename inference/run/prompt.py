"""Log-probabilities of prompt tokens, for requests that ask: each from the logits of the token before it.

T tokens of the step, D width, P of them whose successor is in the prompt, V vocabulary.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ...moe.layers.context import Context
from ...moe.models.decoder import Decoder
from ..core.step import Scheduled
from .sampler import report

LOGITS = 2**22
"""So many are held at once (16 MiB): the rows of a long prompt are computed in slices."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """What a step has found out about one request's prompt.

    Args:
        first: position of the first token that it is about, at least 1.
        tokens: one dict a token, token id → log-probability in nats; None when the logits are not finite.
    """

    first: int
    tokens: list[dict[int, float] | None]


def asks(item: Scheduled) -> bool:
    """Whether this step is to tell of the request's prompt; the choices of a request share it, so the first asks."""
    request = item.request
    inside = item.start + 1 < len(request.prompt_token_ids)
    return inside and request.choice == 0 and request.params.prompt_logprobs is not None


def prompt_logprobs(
    model: Decoder, x_TD: Tensor, context: Context, items: Sequence[Scheduled]
) -> dict[str, PromptLogprobs]:
    """Of every request that `asks`, by its id.

    Args:
        model: whose head to use.
        x_TD: what the last block returned.
        context: the step's; not changed.
        items: the step's requests, in batch order.
    """
    found, row = {}, 0
    for item in items:
        if asks(item):
            request = item.request
            targets = request.prompt_token_ids[item.start + 1 : item.end + 1]
            rows_P = torch.arange(row, row + len(targets), device=x_TD.device)
            tokens_P = torch.tensor(targets, device=x_TD.device)
            top = request.params.prompt_logprobs or 0
            tokens = _score(model, x_TD, copy(context), rows_P, tokens_P, top)
            found[request.id] = PromptLogprobs(item.start + 1, tokens)
        row += item.count
    return found


def _score(
    model: Decoder, x_TD: Tensor, context: Context, rows_P: Tensor, tokens_P: Tensor, top: int
) -> list[dict[int, float] | None]:
    size = max(1, LOGITS // model.cfg.vocab_size)
    found: list[dict[int, float] | None] = []
    for part, tokens in zip(rows_P.split(size), tokens_P.split(size), strict=True):
        context.logit_rows = part
        logits_PV = model.logits(x_TD, context).float()
        finite = logits_PV.amax(-1).isfinite().tolist()
        rows = zip(report(logits_PV, tokens, [top] * len(part)), finite, strict=True)
        found += [logprobs if good else None for logprobs, good in rows]
    return found
