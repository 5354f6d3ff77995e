"""What requests do to their logits before anything is drawn: exclusions, biases and penalties, each row by itself.

In vLLM's order: what a grammar forbids, tokens that are not allowed, bad words, what may not come before `min_tokens`,
then biases, then penalties (repetition, frequency, presence). A token that is excluded stays excluded, whatever its
bias.

R rows (one a request), P of the rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..core.step import Scheduled
from .grammar_mask import hold_to_grammars


def constrain(logits_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    """The logits as the requests want them; rows that ask for nothing keep their bits.

    Args:
        logits_RV: float32, as the model gave them; not changed.
        items: one a row; `item.end` tokens stand before the one to choose.

    Returns:
        `logits_RV` itself where nobody wants anything else.
    """
    if all(item.request.params.leaves_logits and item.request.grammar is None for item in items):
        return logits_RV
    return _penalise(_bias(_exclude(_only_allowed(hold_to_grammars(logits_RV, items), items), items), items), items)


def _only_allowed(logits_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    rows = [row for row, item in enumerate(items) if item.request.params.allowed_token_ids is not None]
    if not rows:
        return logits_RV
    pairs = [(i, t) for i, row in enumerate(rows) for t in items[row].request.params.allowed_token_ids or ()]
    keep_PV = logits_RV.new_zeros(len(rows), logits_RV.shape[1], dtype=torch.bool)
    keep_PV[_index(pairs, logits_RV.device)] = True
    return _replace(logits_RV, rows, logits_RV[rows].masked_fill(~keep_PV, -torch.inf))


def _exclude(logits_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    pairs = [(row, t) for row, item in enumerate(items) for t in _excluded(item) if t < logits_RV.shape[1]]
    if not pairs:
        return logits_RV
    return logits_RV.index_put(_index(pairs, logits_RV.device), logits_RV.new_tensor(-torch.inf))


def _excluded(item: Scheduled) -> Iterator[int]:
    """The last token of every bad sequence that the output has come to, and the stops that come too early."""
    request, begin = item.request, len(item.request.prompt_token_ids)
    for *before, last in request.params.bad_sequences:
        start = item.end - len(before)
        if start >= begin and request.token_ids[start : item.end] == before:
            yield last
    yield from item.suppressed_token_ids


def _bias(logits_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    biases = [(row, *pair) for row, item in enumerate(items) for pair in (item.request.params.logit_bias or {}).items()]
    if not biases:
        return logits_RV
    index = _index([(row, token) for row, token, _ in biases], logits_RV.device)
    return logits_RV.index_put(index, logits_RV.new_tensor([bias for *_, bias in biases]), accumulate=True)


def _penalise(logits_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    """x / r or x · r of tokens seen before (x > 0 or not), then − frequency · count − presence of the output's."""
    rows = [row for row, item in enumerate(items) if item.request.params.penalised]
    if not rows:
        return logits_RV
    requests = [items[row].request for row in rows]
    outputs = [r.token_ids[len(r.prompt_token_ids) : items[row].end] for row, r in zip(rows, requests, strict=True)]
    counts_PV = _counts(outputs, logits_RV)
    seen_PV = (counts_PV + _counts([r.prompt_token_ids for r in requests], logits_RV)) > 0
    factors = [(r.params.repetition_penalty, r.params.frequency_penalty, r.params.presence_penalty) for r in requests]
    repetition_P1, frequency_P1, presence_P1 = logits_RV.new_tensor(factors).split(1, dim=1)
    x_PV = logits_RV[rows]
    x_PV = torch.where(seen_PV, torch.where(x_PV > 0, x_PV / repetition_P1, x_PV * repetition_P1), x_PV)
    return _replace(logits_RV, rows, x_PV - frequency_P1 * counts_PV - presence_P1 * (counts_PV > 0))


def _counts(sequences: Sequence[Sequence[int]], like_RV: Tensor) -> Tensor:
    """How often each token is in each sequence, float32 [P, V]."""
    device = like_RV.device
    ids = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64, device=device)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    rows = torch.arange(len(sequences), device=device).repeat_interleave(lengths, output_size=len(ids))
    counts_PV = like_RV.new_zeros(len(sequences), like_RV.shape[1])
    return counts_PV.index_put_((rows, ids), like_RV.new_ones(()), accumulate=True)


def _index(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    return rows, columns


def _replace(logits_RV: Tensor, rows: Sequence[int], new_PV: Tensor) -> Tensor:
    return logits_RV.index_copy(0, torch.tensor(rows, device=logits_RV.device), new_PV)
