"""Loss of an encoder-decoder on held-out documents: how well it writes the spans taken out of them (data/spans.py).

The documents make one stream, each begun as in training, cut into rows of which the last, shorter one is left out. The
masks are those of seed 0: the same at every layout and for every model with the tokenizer.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ... import DataError
from ...configs.typed import check
from ...parallel.mesh import Mesh
from ..data.config import SpanConfig
from ..data.spans import SpanRows
from ..data.stream import TokenStream
from ..data.tokenizer import Tokenizer
from ..models.decoder import Decoder
from ..train.part import part_of
from .experts import ExpertTally
from .perplexity import EvalResult, evaluating, nats_of, over_ranks


def denoise(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    spans: SpanConfig,
    seq_len: int,
    batch: int = 16,
    mesh: Mesh | None = None,
    dropless: bool = False,
    forward: Callable[..., Tensor | None] | None = None,
) -> EvalResult:
    """The model's loss on the spans of `documents`; collective over `mesh`, as `perplexity.evaluate`.

    Args:
        model: an encoder-decoder, in any mode; it is left in the mode it had.
        spans: what is taken out.
        seq_len: tokens of a row before.
        batch: rows of one forward call of a data-parallel rank.
        mesh, dropless, forward: as `perplexity.evaluate` has them.

    Returns:
        `val_loss` in nats a token of the targets, marks and ends included; without `bits_per_byte`.

    Raises:
        ConfigError: a length that does not fit. DataError: the documents fill no row.
    """
    start, mesh = time.monotonic(), mesh or Mesh.alone(model.device)
    check(batch >= 1, "batch", batch, "must be at least 1", "use 16")
    assert model.cfg.encoder is not None, "a decoder has no source to read"
    if not any(documents):
        raise DataError("the documents hold no text: give some")
    ids = np.concatenate([*tokenizer.encode_batch(documents), [tokenizer.eos_id]])
    marks = [tokenizer.sentinel_id(number) for number in range(spans.count(seq_len))]
    stream = TokenStream(ids, tokenizer.eos_id)
    rows = SpanRows(stream, seq_len, 0, spans, model.cfg.encoder.start_token_id, marks)
    moe = model.cfg.moe
    tally = ExpertTally(model.cfg.moe_layers, moe.num_experts if moe else 0)
    nats = torch.zeros(1, dtype=torch.float64)
    with evaluating(model):
        for step in range(-(-len(rows) // (batch * mesh.dp_size))):
            packed = rows.read((step * mesh.dp_size + mesh.dp_rank) * batch, batch)
            part = part_of(packed, mesh, propagate_nan=mesh.world > 1, dropless=dropless)
            nats += nats_of(part, forward or model)
            tally.add(part.routings)
    tokens = len(rows) * spans.target(seq_len)
    return EvalResult(
        val_loss=float(over_ranks(mesh, nats)) / tokens,
        bits_per_byte=None,
        tokens=tokens,
        bytes=sum(len(text.encode()) for text in documents),
        seconds=time.monotonic() - start,
        experts=tally.report(partial(over_ranks, mesh)),
    )
