"""Loss on held-out documents: every token, and every document's end, is predicted exactly once.

A document is read as in training: BOS, its tokens, EOS as the last target. One longer than `seq_len` is cut into
windows; with a `stride` below `seq_len` they overlap and only the tokens not yet predicted count, so each of these is
given at least `seq_len - stride` tokens of context. A window is one sequence and one routing group, so no number
depends on how windows share a batch or a rank.

T tokens of a batch, R rows that are predicted, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ... import DataError
from ...configs.typed import check
from ...kernels import cross_entropy
from ..data.tokenizer import Tokenizer
from ..models.context import VarlenContext
from ..models.decoder import Decoder
from ..routing.record import RouteContext
from .experts import ExpertReport, ExpertTally


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """An evaluation over all ranks.

    Attributes:
        val_loss: nats a predicted token.
        bits_per_byte: all nats / ln 2 / the documents' UTF-8 bytes; comparable across tokenizers.
        tokens: predicted tokens, one EOS a document included.
        bytes: UTF-8 bytes of the documents.
        seconds: wall clock on this rank.
        experts: one report a MoE layer.
    """

    val_loss: float
    bits_per_byte: float
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
    rank: int = 0,
    size: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
    dropless: bool = False,
) -> EvalResult:
    """The model's loss on `documents`; collective when `size` > 1: every rank makes the same number of forward calls.

    Args:
        model: in any mode; it is evaluated in evaluation mode and left in the mode it had.
        seq_len: tokens of a window, at most the model's.
        stride: new tokens of each further window; None = `seq_len`, no overlap.
        batch: windows of one forward call.
        rank: this rank among the `size` that share the work.
        reduce: sums a float64 CPU tensor over these ranks; needed when `size` > 1.
        dropless: ignore the experts' capacity.

    Raises:
        ConfigError: a length that does not fit. DataError: the documents hold no text.
    """
    start, stride = time.monotonic(), seq_len if stride is None else stride
    longest = model.cfg.max_seq_len
    check(1 <= seq_len <= longest, "seq_len", seq_len, f"must lie in 1 to model.max_seq_len ({longest})", "lower it")
    check(1 <= stride <= seq_len, "stride", stride, f"must lie in 1 to seq_len ({seq_len})", "use seq_len // 2")
    check(batch >= 1, "batch", batch, "must be at least 1", "use 16")
    if size > 1 and reduce is None:
        raise ValueError("several ranks need a reduce")
    together = reduce or (lambda tensor: tensor)
    size_bytes = sum(len(text.encode()) for text in documents)
    if not size_bytes:
        raise DataError("the documents hold no text: give some")
    ids = [np.append(part, tokenizer.eos_id) for part in tokenizer.encode_batch(documents)]
    windows = cut(ids, seq_len, stride)
    moe = model.cfg.moe
    tally = ExpertTally(model.cfg.moe_layers, moe.num_experts if moe else 0)
    nats = torch.zeros(1, dtype=torch.float64)
    with _evaluating(model):
        for step in range(-(-len(windows) // (batch * size))):
            first = (step * size + rank) * batch
            nats += _nats(model, windows[first : first + batch], tally, dropless, propagate_nan=size > 1)
    total, tokens = float(together(nats)), sum(len(part) - 1 for part in ids)
    return EvalResult(
        val_loss=total / tokens,
        bits_per_byte=total / math.log(2) / size_bytes,
        tokens=tokens,
        bytes=size_bytes,
        seconds=time.monotonic() - start,
        experts=tally.report(together),
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


@torch.no_grad()
def _nats(model: Decoder, windows: Sequence[Window], tally: ExpertTally, dropless: bool, propagate_nan: bool) -> Tensor:
    """The summed cross entropy of the scored tokens, [1] float64 on the CPU; 0 for no windows, after a forward call."""
    device = model.embed.weight.device
    lengths = [len(w.ids) - 1 for w in windows]

    def joined(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts])).to(device)

    cu_seqlens = torch.tensor([0, *np.cumsum(lengths, dtype=np.int64)], dtype=torch.int32, device=device)
    rows_R = joined(
        [np.arange(w.scored, n) + b for w, n, b in zip(windows, lengths, cu_seqlens.tolist(), strict=False)]
    )
    tokens_T = joined([w.ids[:-1] for w in windows])
    route = RouteContext(
        cu_groups=cu_seqlens,
        token_ids_T=tokens_T,
        index_T=joined([np.arange(n) + w.first for w, n in zip(windows, lengths, strict=True)]),
        dropless=dropless,
        propagate_nan=propagate_nan,
    )
    ctx = VarlenContext(cu_seqlens, route=route, logit_rows=rows_R)
    logits_RV = model(tokens_T, joined([np.arange(n) for n in lengths]), ctx)
    tally.add(ctx.routings)
    targets_R = joined([w.ids[w.scored + 1 :] for w in windows])
    return cross_entropy(logits_RV, targets_R).double().sum().cpu().reshape(1)


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
