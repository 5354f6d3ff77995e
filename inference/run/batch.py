"""A step plan as flat tensors: what the scheduler decided, in the form that the model reads.

T tokens, B scheduled requests, M blocks of the longest table, R rows whose logits are wanted; S tokens and N inputs of
an encoder.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor

from ..core.step import Scheduled, StepPlan


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a step's requests have of an encoder: the inputs that it reads now, and where its results lie.

    Attributes:
        tokens_S: int64 ids of the inputs of requests that start, one after another.
        positions_S: int64 position of each token in its own input.
        cu_N1: int32 offset of each input's first token.
        slots_S: int64 place in the KV cache of what cross-attention reads of each token.
        tables_BM: int32, each request's blocks of encoder tokens, padded with the null block 0.
        lens_B: int32 encoder tokens of each request.
    """

    tokens_S: Tensor
    positions_S: Tensor
    cu_N1: Tensor
    slots_S: Tensor
    tables_BM: Tensor
    lens_B: Tensor


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
        sampling: the items that sample, in the order of `logit_rows_R`.
        memory: of the encoder; None without one.
        valid_T: bool, False for the rows that fill up a bucket; None = all are somebody's.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    block_tables_BM: Tensor
    context_lens_B: Tensor
    cu_q_B1: Tensor
    logit_rows_R: Tensor
    sampling: tuple[Scheduled, ...]
    memory: Memory | None = None
    valid_T: Tensor | None = None


def build_batch(
    plan: StepPlan,
    block_size: int,
    device: torch.device,
    encoder: bool = False,
    newest: Mapping[str, int] = MappingProxyType({}),
) -> Batch:
    """Lay out `plan` on `device`, with an encoder's part or without. A plan of no tokens gives a batch of size 0.

    Args:
        newest: the tokens that the step before sampled, by request, for those that the plan does not know.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for item in plan.scheduled:
        span = range(item.start, item.start + item.count)
        tokens += item.token_ids
        if len(item.token_ids) < item.count:
            tokens.append(newest[item.request.id])
        positions += span
        slots += _slots(item.block_table, span, block_size)
    ends = [0, *accumulate(item.count for item in plan.scheduled)]
    lengths = [item.end for item in plan.scheduled]
    rows = [end - 1 for item, end in zip(plan.scheduled, ends[1:], strict=True) if item.samples]

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        tokens_T=tensor(tokens, torch.int64),
        positions_T=tensor(positions, torch.int64),
        slots_T=tensor(slots, torch.int64),
        block_tables_BM=_tables([item.block_table for item in plan.scheduled], device),
        context_lens_B=tensor(lengths, torch.int32),
        cu_q_B1=tensor(ends, torch.int32),
        logit_rows_R=tensor(rows, torch.int64),
        sampling=tuple(item for item in plan.scheduled if item.samples),
        memory=_memory(plan, block_size, device) if encoder else None,
    )


def _memory(plan: StepPlan, block_size: int, device: torch.device) -> Memory:
    inputs = [item.request.encoder_token_ids or () for item in plan.scheduled]
    fresh = [(item, ids) for item, ids in zip(plan.scheduled, inputs, strict=True) if item.encoded]

    def tensor(values: Iterable[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    return Memory(
        tokens_S=tensor((token for _, ids in fresh for token in ids), torch.int64),
        positions_S=tensor((at for _, ids in fresh for at in range(len(ids))), torch.int64),
        cu_N1=tensor([0, *accumulate(len(ids) for _, ids in fresh)], torch.int32),
        slots_S=tensor(
            (slot for item, ids in fresh for slot in _slots(item.memory_table, range(len(ids)), block_size)),
            torch.int64,
        ),
        tables_BM=_tables([item.memory_table for item in plan.scheduled], device),
        lens_B=tensor((len(ids) for ids in inputs), torch.int32),
    )


def _slots(table: Sequence[int], span: range, block_size: int) -> list[int]:
    return [table[at // block_size] * block_size + at % block_size for at in span]


def _tables(tables: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(map(len, tables), default=0)
    rows = [[*table, *[0] * (longest - len(table))] for table in tables]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(len(rows), longest)
