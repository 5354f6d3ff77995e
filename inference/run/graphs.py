"""Decode steps in a few fixed shapes, as a captured graph needs them: G1 of the serving specification.

A step that computes one token of every request runs in the smallest bucket that holds it, filled up with rows that are
nobody's: token 0 at position 0, written to and read from the null block, not valid, so that they route nowhere and
count nowhere. Anything else, a prefill or more requests than the largest bucket, runs as it is.

T tokens, B requests, M blocks of the longest table, N rows of a bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...configs.typed import check
from .batch import Batch


@dataclass(frozen=True)
class Buffers:
    """The static tensors of decode steps of N rows."""

    tokens_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    tables_NM: Tensor
    lens_N: Tensor
    valid_N: Tensor
    cu_q_N1: Tensor
    rows_N: Tensor

    @classmethod
    def of(cls, size: int, width: int, device: torch.device) -> "Buffers":
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            tokens_N=zeros(torch.int64, size),
            positions_N=zeros(torch.int64, size),
            slots_N=zeros(torch.int64, size),
            tables_NM=zeros(torch.int32, size, width),
            lens_N=zeros(torch.int32, size),
            valid_N=zeros(torch.bool, size),
            cu_q_N1=torch.arange(size + 1, dtype=torch.int32, device=device),
            rows_N=torch.arange(size, device=device),
        )

    def fill(self, batch: Batch) -> None:
        """The batch's rows first, then nobody's."""
        _fill(self.tokens_N, batch.tokens_T)
        _fill(self.positions_N, batch.positions_T)
        _fill(self.slots_N, batch.slots_T)
        _fill(self.tables_NM[:, : batch.block_tables_BM.shape[1]], batch.block_tables_BM)
        _fill(self.lens_N, batch.context_lens_B, rest=1)

    def over(self, batch: Batch) -> Batch:
        """The batch as it lies here."""
        return replace(
            batch,
            tokens_T=self.tokens_N,
            positions_T=self.positions_N,
            slots_T=self.slots_N,
            block_tables_BM=self.tables_NM,
            context_lens_B=self.lens_N,
            cu_q_B1=self.cu_q_N1,
            logit_rows_R=self.rows_N,
        )


class GraphBuckets:
    """The buckets' input buffers. A padded batch is valid until the next one.

    Args:
        sizes: rows of each bucket, ascending; none = every step runs as it is.
        width: blocks of the longest sequence.
        device: the model's.
        encoder: the model has one.

    Raises:
        ConfigError: on CUDA a graph would have to be captured, which the forward pass does not allow; or there is an
            encoder, whose part of a step has no fixed shape.
    """

    def __init__(self, sizes: Sequence[int], width: int, device: torch.device, *, encoder: bool = False) -> None:
        rule = (
            "can not be captured on CUDA: a forward pass asks the device how many rows the experts get "
            "(sort_by_expert) and how long the contexts are (paged_attention)"
        )
        named, fix = ", ".join(map(str, sizes)), "leave it empty"
        check(not sizes or device.type != "cuda", "graph_buckets", named, rule, fix)
        check(not (sizes and encoder), "graph_buckets", named, "need a model without an encoder", fix)
        self._buffers = {size: Buffers.of(size, width, device) for size in sizes}

    def pad(self, batch: Batch) -> Batch:
        """The batch in the buffers of its bucket, its rows first; the batch itself where it has none."""
        count = batch.tokens_T.numel()
        size = next((size for size in self._buffers if size >= count), None)
        if size is None or not decodes(batch):
            return batch
        buffers = self._buffers[size]
        buffers.fill(batch)
        buffers.tables_NM[:, batch.block_tables_BM.shape[1] :] = 0
        _fill(buffers.valid_N, buffers.valid_N.new_ones(count))
        return replace(buffers.over(batch), valid_T=buffers.valid_N)


def decodes(batch: Batch) -> bool:
    """Whether the batch is one token of every request, each of which wants the next."""
    return 0 < batch.tokens_T.numel() == batch.context_lens_B.numel() == batch.logit_rows_R.numel()


def fill_up(rows_BLE: Tensor | None, batch: Batch) -> Tensor | None:
    """Rows of the batch's requests followed by zeros for those that fill it up."""
    if rows_BLE is None or batch.valid_T is None:
        return rows_BLE
    missing = batch.context_lens_B.numel() - rows_BLE.shape[0]
    return torch.cat((rows_BLE, rows_BLE.new_zeros(missing, *rows_BLE.shape[1:])))


def _fill(buffer: Tensor, values: Tensor, rest: int = 0) -> None:
    if len(buffer) == len(values):
        buffer.copy_(values)
        return
    buffer[: len(values)].copy_(values)
    buffer[len(values) :] = rest
