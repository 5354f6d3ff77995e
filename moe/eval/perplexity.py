"""Loss on held-out documents: every token, and every document's end, is predicted exactly once.

A document is read as in training: BOS, its tokens, EOS as the last target. One longer than `seq_len` is cut into
windows; with a `stride` below `seq_len` they overlap and only the tokens not yet predicted count, so each of these is
given at least `seq_len - stride` tokens of context. A window is one sequence and one routing group, so no number
depends on how windows share a batch or are spread over ranks.

T tokens held here, R of them that are scored, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ... import DataError
from ...configs.typed import check
from ...kernels import cross_entropy
from ...parallel import process
from ...parallel.mesh import Mesh
from ..data.rows import Batch
from ..data.tokenizer import Tokenizer
from ..models.decoder import Decoder
from ..train.part import Part, part_of
from .experts import ExpertReport, ExpertTally


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """An evaluation over all ranks.

    Attributes:
        val_loss: nats a predicted token.
        bits_per_byte: all nats / ln 2 / the documents' UTF-8 bytes; comparable across tokenizers. None where not the
            whole text is predicted (`denoising`).
        tokens: predicted tokens, one EOS a document included.
        bytes: UTF-8 bytes of the documents.
        seconds: wall clock on this rank.
        experts: one report a MoE layer.
    """

    val_loss: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    seconds: float
    experts: tuple[ExpertReport, ...]


@dataclass(frozen=True)
class Window:
    """`ids[i]` predicts `ids[i + 1]`; only predictions from number `scored` on count. `first` keys random numbers."""

    ids: np.ndarray
    scored: int
    first: int


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    seq_len: int,
    stride: int | None = None,
    batch: int = 16,
    mesh: Mesh | None = None,
    dropless: bool = False,
    forward: Callable[..., Tensor | None] | None = None,
) -> EvalResult:
    """The model's loss on `documents`; collective over `mesh`: every rank makes the same number of forward calls.

    Args:
        model: in any mode; it is evaluated in evaluation mode and left in the mode it had.
        seq_len: tokens of a window, at most the model's.
        stride: new tokens of each further window; None = `seq_len`, no overlap.
        batch: windows of one forward call of a data-parallel rank.
        mesh: the ranks that share the work, on which the model lies; None = this one alone.
        dropless: ignore the experts' capacity.
        forward: computes the logits in place of `model`; None where they are on another rank (pipelines).

    Raises:
        ConfigError: a length that does not fit. DataError: the documents hold no text.
    """
    start, stride = time.monotonic(), seq_len if stride is None else stride
    longest = model.cfg.max_seq_len
    check(1 <= seq_len <= longest, "seq_len", seq_len, f"must lie in 1 to model.max_seq_len ({longest})", "lower it")
    check(1 <= stride <= seq_len, "stride", stride, f"must lie in 1 to seq_len ({seq_len})", "use seq_len // 2")
    check(batch >= 1, "batch", batch, "must be at least 1", "use 16")
    mesh = mesh or Mesh.alone(model.device)
    size_bytes = sum(len(text.encode()) for text in documents)
    if not size_bytes:
        raise DataError("the documents hold no text: give some")
    ids = [np.append(part, tokenizer.eos_id) for part in tokenizer.encode_batch(documents)]
    windows = cut(ids, seq_len, stride)
    moe = model.cfg.moe
    tally = ExpertTally(model.cfg.moe_layers, moe.num_experts if moe else 0)
    nats = torch.zeros(1, dtype=torch.float64)
    with evaluating(model):
        for step in range(-(-len(windows) // (batch * mesh.dp_size))):
            first = (step * mesh.dp_size + mesh.dp_rank) * batch
            packed = pack(windows[first : first + batch], mesh.layout.pieces, tokenizer.eos_id)
            part = part_of(packed, mesh, propagate_nan=mesh.world > 1, dropless=dropless)
            nats += nats_of(part, forward or model)
            tally.add(part.ctx.routings, part.valid_T)
    total, tokens = float(over_ranks(mesh, nats)), sum(len(part) - 1 for part in ids)
    return EvalResult(
        val_loss=total / tokens,
        bits_per_byte=total / math.log(2) / size_bytes,
        tokens=tokens,
        bytes=size_bytes,
        seconds=time.monotonic() - start,
        experts=tally.report(partial(over_ranks, mesh)),
    )


def limit_bytes(documents: Sequence[str], limit: int | None) -> list[str]:
    """The documents from the first on, the last one cut so that at most `limit` UTF-8 bytes remain; None = all."""
    kept, left = [], limit
    for text in documents:
        data = text.encode()
        if left is None or len(data) <= left:
            kept.append(text)
        elif left:
            kept.append(data[:left].decode(errors="ignore"))
        left = None if left is None else max(left - len(data), 0)
        if left == 0:
            break
    return kept


def cut(documents: Sequence[np.ndarray], seq_len: int, stride: int) -> list[Window]:
    """Windows over documents (BOS ... EOS) in which every id but each document's first is scored exactly once."""
    windows, first = [], 0
    for ids in documents:
        last, begin, done = len(ids) - 1, 0, 0
        while done < last:
            end = min(begin + seq_len, last)
            windows.append(Window(ids[begin : end + 1], done - begin, first))
            first += end - begin
            begin, done = begin + stride, end
    return windows


def pack(windows: Sequence[Window], pieces: int, filler: int) -> Batch:
    """Windows laid end to end; where ranks divide them, one more sequence, which is padding, completes the `pieces`."""
    lengths = [len(w.ids) - 1 for w in windows]
    tokens = sum(lengths)
    padding = -tokens % pieces if tokens or pieces == 1 else pieces
    targets = [np.where(np.arange(n) < w.scored, -1, w.ids[1:]) for w, n in zip(windows, lengths, strict=True)]

    def joined(parts: list[np.ndarray], fill: int) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts, np.full(padding, fill)]))

    ends = [0, *np.cumsum(lengths, dtype=np.int64), *([tokens + padding] if padding else [])]
    borders = torch.tensor(ends, dtype=torch.int32)
    return Batch(
        tokens_T=joined([w.ids[:-1] for w in windows], filler),
        targets_T=joined(targets, -1),
        positions_T=joined([np.arange(n) for n in lengths], 0),
        cu_seqlens=borders,
        cu_rows=borders,
        valid_T=torch.arange(tokens + padding) < tokens,
        index_T=joined([np.arange(n) + w.first for w, n in zip(windows, lengths, strict=True)], 0),
        total_tokens=sum(n - w.scored for w, n in zip(windows, lengths, strict=True)),
    )


@torch.no_grad()
def nats_of(part: Part, forward: Callable[..., Tensor | None]) -> Tensor:
    """The summed cross entropy of the scored tokens held here, [1] float64 on the CPU; 0 where there is none."""
    rows_R = (part.targets_T >= 0).nonzero().flatten()
    part.ctx.logit_rows = rows_R
    logits_RV = forward(*part.inputs)
    if logits_RV is None:
        return torch.zeros(1, dtype=torch.float64)
    return cross_entropy(logits_RV, part.targets_T[rows_R]).double().sum().cpu().reshape(1)


def over_ranks(mesh: Mesh, sums: Tensor) -> Tensor:
    """The sum over all ranks that take part."""
    return process.all_sum(sums, "sum of an evaluation") if mesh.world > 1 else sums


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """The model in evaluation mode; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
