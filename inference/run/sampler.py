"""The next token of every request that samples, the whole batch at once.

In vLLM's order: log-probabilities of the raw logits; allowed tokens, bad words, `min_tokens`, logit bias; repetition,
frequency and presence penalty (`logits.constrain`); then greedy, or temperature, min-p, top-k, top-p and a draw. One
uniform number picks from the distribution in vocabulary order. It is keyed by (seed, choice, position, purpose), so
what a request draws depends neither on its batch-mates nor on its row, nor on chunking, preemption or cache hits. Ties
go to the lower token id.

R rows (one a request), P of the rows, V vocabulary, C candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.random import SAMPLE, uniform
from ..core.sampling import MAX_LOGPROBS, SamplingParams
from ..core.step import Scheduled
from .logits import constrain

GREEDY = 1e-5
"""Temperatures below are greedy: float32 logits divided by them overflow."""

FLAT = 1e9
"""Temperatures above are all the same: every token is equally probable."""
CANDIDATES = 1024
"""So many tokens almost always hold the top p."""


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
    params = [item.request.params for item in items]
    scores_RV = constrain(logits_RV, items)
    top_R = scores_RV.amax(-1)
    drawn = [row for row, p in enumerate(params) if p.temperature >= GREEDY]
    if len(drawn) == len(items):
        tokens_R = _random(scores_RV, items)
    else:
        tokens_R = _lowest_argmax(scores_RV, top_R)
        if drawn:
            tokens_R[drawn] = _random(scores_RV[drawn], [items[row] for row in drawn])
    possible_R = top_R.isfinite()
    finite_R = possible_R if scores_RV is logits_RV else logits_RV.amax(-1).isfinite()
    logprobs = _logprobs(logits_RV, tokens_R, params)
    rows = zip(tokens_R.tolist(), finite_R.tolist(), possible_R.tolist(), logprobs, strict=True)
    return [
        Sampled(token, logprob) if finite and possible else Sampled(None, excluded=finite)
        for token, finite, possible, logprob in rows
    ]


def _lowest_argmax(scores_RV: Tensor, top_R: Tensor) -> Tensor:
    """The lowest index of each row's highest score (`torch.argmax` promises none of them); a row of NaN has any."""
    if scores_RV.device.type == "cpu":
        return torch.from_numpy(scores_RV.numpy().argmax(-1))  # NumPy promises the first, and is six times as fast
    vocabulary = scores_RV.shape[1]
    at_V = torch.arange(vocabulary, device=scores_RV.device)
    return torch.where(scores_RV == top_R[:, None], at_V, vocabulary - 1).amin(-1)


def _random(scores_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    """A token of each row, by temperature, min-p, top-k and top-p."""
    params = [item.request.params for item in items]
    temperature_R1 = scores_RV.new_tensor([min(p.temperature, FLAT) for p in params])[:, None]
    probs_RV = (scores_RV / temperature_R1).softmax(-1)
    return _draw(_truncate(_above_min_p(probs_RV, params), params), items)


def _above_min_p(probs_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities below min_p times the row's highest set to 0 (Nguyen et al. 2024)."""
    if not any(p.min_p > 0 for p in params):
        return probs_RV
    min_p_R1 = probs_RV.new_tensor([p.min_p for p in params])[:, None]
    return probs_RV.masked_fill(probs_RV < min_p_R1 * probs_RV.amax(-1, keepdim=True), 0.0)


def _truncate(probs_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities (not renormalised) outside the top k, then outside the top p of what is left, set to 0."""
    rows = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if not rows:
        return probs_RV
    vocabulary, device = probs_RV.shape[1], probs_RV.device
    top_k = [min(params[row].top_k, vocabulary) for row in rows]
    top_p = [params[row].top_p for row in rows]
    limit_P1 = torch.tensor([k if k > 0 else vocabulary for k in top_k], device=device)[:, None]
    mass_P1 = torch.tensor([p if p < 1 else math.inf for p in top_p], dtype=torch.float64, device=device)[:, None]
    return probs_RV.index_copy(0, torch.tensor(rows, device=device), _keep(probs_RV[rows], limit_P1, mass_P1))


def _keep(probs_PV: Tensor, limit_P1: Tensor, mass_P1: Tensor) -> Tensor:
    """Keep the first tokens of each row, by probability and then by id, that are within `limit` and reach `mass`.

    Sorting a vocabulary is the dearest part of sampling and most of it is never wanted: look at the best ones first.
    """
    count_P1, least_P1, enough_P = _border(probs_PV, limit_P1, mass_P1, min(CANDIDATES, probs_PV.shape[1]))
    if not bool(enough_P.all()):
        flat = ~enough_P
        whole = _border(probs_PV[flat], limit_P1[flat], mass_P1[flat], probs_PV.shape[1])
        count_P1[flat], least_P1[flat] = whole[:2]
    above_PV, equal_PV = probs_PV > least_P1, probs_PV == least_P1
    wanted_P1 = count_P1 - above_PV.sum(-1, keepdim=True)
    return probs_PV.masked_fill(~(above_PV | equal_PV & (equal_PV.cumsum(-1) <= wanted_P1)), 0.0)


def _border(probs_PV: Tensor, limit_P1: Tensor, mass_P1: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(How many tokens to keep, the least probability among them, whether the best `size` tokens could tell)."""
    best_PC = probs_PV.topk(size).values if size < probs_PV.shape[1] else probs_PV.sort(dim=-1, descending=True).values
    within_PC = torch.arange(size, device=probs_PV.device) < limit_P1
    chosen_PC = best_PC.double().masked_fill(~within_PC, 0.0)
    reached_PC = chosen_PC.cumsum(-1)
    total_P1 = torch.where(limit_P1 <= size, reached_PC[:, -1:], row_sums(probs_PV))
    before_PC = reached_PC - chosen_PC
    inside_PC = within_PC & (before_PC < mass_P1 * total_P1)
    count_P1 = inside_PC.sum(-1, keepdim=True).clamp(min=1)  # at least one token stays
    enough_P = (limit_P1 <= size)[:, 0] | ~inside_PC[:, -1]
    return count_P1, best_PC.gather(1, count_P1 - 1), enough_P


def row_sums(x_RV: Tensor) -> Tensor:
    """float64 [R, 1], each row's bits its own: PyTorch would divide the sum of one row alone over threads."""
    return x_RV[:, None].expand(-1, 2, -1).sum(-1, dtype=torch.float64)[:, :1]


def _draw(probs_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    """The token at which the cumulative probability passes u · total, u ~ U[0, 1) keyed by (seed, choice, position)."""
    device = probs_RV.device
    seeds = [item.request.seed for item in items]
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    u_R1 = uniform(
        torch.tensor(signed, device=device),
        torch.tensor([item.end for item in items], device=device),
        step=torch.tensor([item.request.choice for item in items], device=device),
        layer=0,
        purpose=SAMPLE,
    )
    cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    drawn_R = torch.searchsorted(cumulative_RV, u_R1 * cumulative_RV[:, -1:], right=True)[:, 0]
    return drawn_R.clamp(max=probs_RV.shape[1] - 1)


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
