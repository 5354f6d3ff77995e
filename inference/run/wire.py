"""A step plan as integers, for ranks that know no requests: what is computed and where it goes, nothing about sampling.

B scheduled requests, T tokens, N blocks of all their tables.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..core.request import Request
from ..core.sampling import SamplingParams
from ..core.step import Scheduled, StepPlan

SOMEONE = Request(id="", prompt_token_ids=(0,), params=SamplingParams())
"""Stands for every request."""


def pack(plan: StepPlan, newest: Mapping[str, int]) -> list[Tensor]:
    """What `unpack` reads: int64 numbers of the items [B, 6], tokens [T], blocks [N].

    Args:
        newest: the tokens that the step before sampled, by request, for those that the plan does not know.
    """
    numbers = [
        (item.start, item.count, item.samples, len(item.block_table), *(item.copied or (-1, -1)))
        for item in plan.scheduled
    ]
    tokens = [token for item in plan.scheduled for token in _tokens(item, newest)]
    blocks = [block for item in plan.scheduled for block in item.block_table]
    return [
        torch.tensor(numbers, dtype=torch.int64).view(-1, 6),
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(blocks, dtype=torch.int64),
    ]


def unpack(tensors: Sequence[Tensor]) -> StepPlan:
    """The plan again, with `SOMEONE` for every request."""
    numbers, tokens, blocks = (tensor.tolist() for tensor in tensors)
    tokens_at = pairwise(accumulate((item[1] for item in numbers), initial=0))
    blocks_at = pairwise(accumulate((item[3] for item in numbers), initial=0))
    items = tuple(
        Scheduled(
            request=SOMEONE,
            start=start,
            count=count,
            token_ids=tokens[slice(*own)],
            block_table=blocks[slice(*table)],
            samples=bool(samples),
            copied=None if source < 0 else (source, target),
        )
        for (start, count, samples, _, source, target), own, table in zip(numbers, tokens_at, blocks_at, strict=True)
    )
    return StepPlan(items, len(tokens), (), ())


def _tokens(item: Scheduled, newest: Mapping[str, int]) -> Sequence[int]:
    known = item.token_ids
    return known if len(known) == item.count else [*known, newest[item.request.id]]
