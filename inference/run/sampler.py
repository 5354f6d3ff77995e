"""The next token of every request that samples, the whole batch at once.

In vLLM's order: log-probabilities of the raw logits; allowed tokens, bad words, `min_tokens`, logit bias; repetition,
frequency and presence penalty (`logits.constrain`); then greedy, or temperature, min-p, top-k, top-p and a draw. One
uniform number picks from the distribution in vocabulary order. It is keyed by (seed, choice, position, purpose), so
what a request draws depends neither on its batch-mates nor on its row, nor on chunking, preemption or cache hits. Ties
go to the lower token id.

R rows (one a request), P of the rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import sample_rows
from ..core.sampling import MAX_LOGPROBS, SamplingParams
from ..core.step import Scheduled
from .logits import constrain


@dataclass(frozen=True)
class Sampled:
    """One request's next token.

    Args:
        token: its id, or None when no token can be chosen and the request has failed.
        logprobs: token id → log-probability in nats of the sampled and of the most probable tokens, before temperature
            and truncation; None unless asked for.
        excluded: there is no token because the request has excluded them all; otherwise its logits are not finite.
    """

    token: int | None
    logprobs: dict[int, float] | None = None
    excluded: bool = False


@torch.inference_mode()
def sample(logits_RV: Tensor, items: Sequence[Scheduled]) -> list[Sampled]:
    """Choose a token for each row.

    Args:
        logits_RV: float32, as the model gave them; not changed.
        items: one a row; `item.end` is the position of the token to choose.
    """
    if not items:
        return []
    scores_RV = constrain(logits_RV, items)
    tokens_R, top_R = _choose(scores_RV, items), scores_RV.amax(-1)
    possible_R = top_R.isfinite()
    finite_R = possible_R if scores_RV is logits_RV else logits_RV.amax(-1).isfinite()
    logprobs = _logprobs(logits_RV, tokens_R, [item.request.params for item in items])
    rows = zip(tokens_R.tolist(), finite_R.tolist(), possible_R.tolist(), logprobs, strict=True)
    return [
        Sampled(token, logprob) if finite and possible else Sampled(None, excluded=finite)
        for token, finite, possible, logprob in rows
    ]


def _choose(scores_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    """A token of each row, keyed by (seed, choice, position)."""
    params, vocabulary = [item.request.params for item in items], scores_RV.shape[1]
    seeds = [item.request.seed for item in items]

    def tensor(values: list[float] | list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=scores_RV.device)

    return sample_rows(
        scores_RV,
        tensor([p.temperature for p in params], torch.float64),
        tensor([min(p.top_k, vocabulary) for p in params]),
        tensor([p.top_p for p in params], torch.float64),
        tensor([p.min_p for p in params], torch.float64),
        tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds]),
        tensor([item.request.choice for item in items]),
        tensor([item.end for item in items]),
    )


def _logprobs(logits_RV: Tensor, tokens_R: Tensor, params: Sequence[SamplingParams]) -> list[dict[int, float] | None]:
    found: list[dict[int, float] | None] = [None] * len(params)
    rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    if rows:
        counts = [params[row].logprobs or 0 for row in rows]
        for row, logprobs in zip(rows, report(logits_RV[rows], tokens_R[rows], counts), strict=True):
            found[row] = logprobs
    return found


def report(logits_PV: Tensor, tokens_P: Tensor, counts: Sequence[int]) -> list[dict[int, float]]:
    """Token id → log-probability in nats of each row's token, then of its `counts` most probable ones, best first."""
    logprobs_PV = logits_PV.log_softmax(-1)
    top = logprobs_PV.topk(min(MAX_LOGPROBS, logits_PV.shape[1]))
    ids = torch.cat([tokens_P[:, None], top.indices], dim=1).tolist()
    values = torch.cat([logprobs_PV.gather(1, tokens_P[:, None]), top.values], dim=1).tolist()
    return [
        dict(zip(tokens[: 1 + count], logprobs[: 1 + count], strict=True))
        for tokens, logprobs, count in zip(ids, values, counts, strict=True)
    ]
