"""A step plan as flat tensors: what the scheduler decided, in the form that the model reads.

T tokens, B scheduled requests, M blocks of the longest table, R rows whose logits are wanted; S tokens and N inputs of
an encoder.
"""

from array import array
from collections.abc import Mapping, Sequence
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
    tokens, positions, slots = array("q"), array("q"), array("q")
    for item in plan.scheduled:
        tokens.extend(item.token_ids)
        if len(item.token_ids) < item.count:
            tokens.append(newest[item.request.id])
        if item.count == 1:
            positions.append(item.start)
            slots.append(item.block_table[item.start // block_size] * block_size + item.start % block_size)
        else:
            span = range(item.start, item.start + item.count)
            positions.extend(span)
            slots.extend(_slots(item.block_table, span, block_size))
    ends = array("i", [0, *accumulate(item.count for item in plan.scheduled)])
    lengths = array("i", [item.end for item in plan.scheduled])
    rows = array("q", [end - 1 for item, end in zip(plan.scheduled, ends[1:], strict=True) if item.samples])
    longest, tables = _tables([item.block_table for item in plan.scheduled])
    tokens_T, positions_T, slots_T, logit_rows_R = _tensors((tokens, positions, slots, rows), torch.int64, device)
    tables_N, context_lens_B, cu_q_B1 = _tensors((tables, lengths, ends), torch.int32, device)
    return Batch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        slots_T=slots_T,
        block_tables_BM=tables_N.view(len(lengths), longest),
        context_lens_B=context_lens_B,
        cu_q_B1=cu_q_B1,
        logit_rows_R=logit_rows_R,
        sampling=tuple(item for item in plan.scheduled if item.samples),
        memory=_memory(plan, block_size, device) if encoder else None,
    )


def _memory(plan: StepPlan, block_size: int, device: torch.device) -> Memory:
    inputs = [item.request.encoder_token_ids or () for item in plan.scheduled]
    fresh = [(item, ids) for item, ids in zip(plan.scheduled, inputs, strict=True) if item.encoded]
    tokens, positions, slots = array("q"), array("q"), array("q")
    for item, ids in fresh:
        tokens.extend(ids)
        positions.extend(range(len(ids)))
        slots.extend(_slots(item.memory_table, range(len(ids)), block_size))
    starts, lengths = array("i", [0, *accumulate(len(ids) for _, ids in fresh)]), array("i", map(len, inputs))
    longest, tables = _tables([item.memory_table for item in plan.scheduled])
    tokens_S, positions_S, slots_S = _tensors((tokens, positions, slots), torch.int64, device)
    tables_N, lens_B, cu_N1 = _tensors((tables, lengths, starts), torch.int32, device)
    return Memory(
        tokens_S=tokens_S,
        positions_S=positions_S,
        cu_N1=cu_N1,
        slots_S=slots_S,
        tables_BM=tables_N.view(len(inputs), longest),
        lens_B=lens_B,
    )


def _slots(table: Sequence[int], span: range, block_size: int) -> list[int]:
    return [table[at // block_size] * block_size + at % block_size for at in span]


def _tables(tables: Sequence[Sequence[int]]) -> "tuple[int, array[int]]":
    """The longest table's blocks, and all tables one after another, padded to it."""
    longest, rows = max(map(len, tables), default=0), array("i")
    for table in tables:
        rows.extend(table)
        rows.frombytes(bytes(rows.itemsize * (longest - len(table))))
    return longest, rows


def _tensors(parts: "Sequence[array[int]]", dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """One tensor a part; they travel to the device together."""
    joined = sum(parts[1:], parts[0])
    whole_N = torch.frombuffer(joined, dtype=dtype).to(device) if joined else torch.empty(0, dtype=dtype, device=device)
    return whole_N.split([len(part) for part in parts])
