"""A step plan as flat tensors: what the scheduler decided, in the form that the model reads.

T tokens, B scheduled requests, M blocks of the longest table, R rows whose logits are wanted.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..core.request import Request
from ..core.scheduler import StepPlan


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's tokens, request after request, prefill chunks and decodes alike.

    Attributes:
        tokens_T: int64 ids.
        positions_T: int64 position of each token in its own sequence.
        slots_T: int64 place in the KV cache: block · block_size + offset.
        block_tables_BM: int32, padded with the null block 0.
        context_lens_B: int32 tokens of each sequence, those of this step included.
        cu_q_B1: int32 offset of each request's first token.
        logit_rows_R: int64, the last token of each request that samples; a prefill chunk that is not the last has none.
        sampling: the requests that sample, in the order of `logit_rows_R`.
        memory_slots_S: int64 place of each encoder token of the requests that begin; these three are None without an
            encoder.
        memory_tables_BM: int32, each request's blocks of encoder tokens.
        memory_lens_B: int32 encoder tokens of each request.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    block_tables_BM: Tensor
    context_lens_B: Tensor
    cu_q_B1: Tensor
    logit_rows_R: Tensor
    sampling: tuple[Request, ...]
    memory_slots_S: Tensor | None = None
    memory_tables_BM: Tensor | None = None
    memory_lens_B: Tensor | None = None


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> Batch:
    """Lay out `plan` on `device`. A plan of no tokens gives an ordinary batch of size 0."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for item in plan.scheduled:
        span = range(item.start, item.start + item.count)
        tokens += item.token_ids
        positions += span
        slots += [item.block_table[at // block_size] * block_size + at % block_size for at in span]
    ends = [0, *accumulate(item.count for item in plan.scheduled)]
    longest = max((len(item.block_table) for item in plan.scheduled), default=0)
    tables = [[*item.block_table, *[0] * (longest - len(item.block_table))] for item in plan.scheduled]
    lengths = [item.start + item.count for item in plan.scheduled]
    rows = [end - 1 for item, end in zip(plan.scheduled, ends[1:], strict=True) if item.samples]

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        tokens_T=tensor(tokens, torch.int64),
        positions_T=tensor(positions, torch.int64),
        slots_T=tensor(slots, torch.int64),
        block_tables_BM=tensor(tables, torch.int32).view(len(tables), longest),
        context_lens_B=tensor(lengths, torch.int32),
        cu_q_B1=tensor(ends, torch.int32),
        logit_rows_R=tensor(rows, torch.int64),
        sampling=tuple(item.request for item in plan.scheduled if item.samples),
    )
