"""The next token of each row of scores: greedy, or by temperature, min-p, top-k, top-p and a draw.

R rows, P of the rows, V vocabulary, C candidates.
"""

import math

import torch
from torch import Tensor

from ..random import SAMPLE, uniform

GREEDY = 1e-5
"""Temperatures below are greedy: float32 scores divided by them overflow."""

FLAT = 1e9
"""Temperatures above are all the same: every token is equally probable."""
CANDIDATES = 1024
"""So many tokens almost always hold the top p."""


def sample_rows(
    scores_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, seeds_R: Tensor,
    choices_R: Tensor, positions_R: Tensor,
) -> Tensor:  # fmt: skip
    wishes = (temperature_R, top_k_R, top_p_R, min_p_R, seeds_R, choices_R, positions_R)
    drawn_R = temperature_R >= GREEDY
    if bool(drawn_R.all()):
        return _random(scores_RV, *wishes)
    tokens_R = lowest_argmax(scores_RV)
    if bool(drawn_R.any()):
        rows = drawn_R.nonzero()[:, 0]
        tokens_R[rows] = _random(scores_RV[rows], *(t[rows] for t in wishes))
    return tokens_R


def lowest_argmax(scores_RV: Tensor) -> Tensor:
    """The lowest index of each row's highest score (`torch.argmax` promises none of them); a row of NaN has any."""
    if scores_RV.device.type == "cpu":
        return torch.from_numpy(scores_RV.numpy().argmax(-1))  # NumPy promises the first, and is six times as fast
    vocabulary = scores_RV.shape[1]
    at_V = torch.arange(vocabulary, device=scores_RV.device)
    return torch.where(scores_RV == scores_RV.amax(-1, keepdim=True), at_V, vocabulary - 1).amin(-1)


def probabilities(scores_RV: Tensor, temperature_R: Tensor) -> Tensor:
    return (scores_RV / temperature_R.clamp(max=FLAT).to(scores_RV.dtype)[:, None]).softmax(-1)


def _random(
    scores_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, seeds_R: Tensor,
    choices_R: Tensor, positions_R: Tensor,
) -> Tensor:  # fmt: skip
    """A token of each row, by temperature, min-p, top-k and top-p."""
    probs_RV = _above_min_p(probabilities(scores_RV, temperature_R), min_p_R)
    u_R1 = uniform(seeds_R, positions_R, step=choices_R, layer=0, purpose=SAMPLE)
    return _draw(_truncate(probs_RV, top_k_R, top_p_R), u_R1)


def _above_min_p(probs_RV: Tensor, min_p_R: Tensor) -> Tensor:
    """Probabilities below min_p times the row's highest set to 0 (Nguyen et al. 2024)."""
    if not bool((min_p_R > 0).any()):
        return probs_RV
    min_p_R1 = min_p_R.to(probs_RV.dtype)[:, None]
    return probs_RV.masked_fill(probs_RV < min_p_R1 * probs_RV.amax(-1, keepdim=True), 0.0)


def _truncate(probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Probabilities (not renormalised) outside the top k, then outside the top p of what is left, set to 0."""
    rows = ((top_k_R > 0) | (top_p_R < 1)).nonzero()[:, 0]
    if not len(rows):
        return probs_RV
    vocabulary, top_k_P1, top_p_P1 = probs_RV.shape[1], top_k_R[rows, None], top_p_R[rows, None]
    limit_P1 = torch.where(top_k_P1 > 0, top_k_P1.clamp(max=vocabulary), vocabulary)
    mass_P1 = torch.where(top_p_P1 < 1, top_p_P1, math.inf)
    return probs_RV.index_copy(0, rows, _keep(probs_RV[rows], limit_P1, mass_P1))


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


def _draw(probs_RV: Tensor, u_R1: Tensor) -> Tensor:
    """The token at which the cumulative probability passes u · total."""
    cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    drawn_R = torch.searchsorted(cumulative_RV, u_R1 * cumulative_RV[:, -1:], right=True)[:, 0]
    return drawn_R.clamp(max=probs_RV.shape[1] - 1)
