"""What a small model is worth as the draft of a large one: how many of its tokens the large one would take.

In speculative decoding (Leviathan et al. 2211.17192) a draft q proposes γ tokens and the target p, in one pass, takes
each with probability min(1, p / q). At one position it takes β = Σ_v min(p(v), q(v)) (Corollary 3.6: 1 - the total
variation); α = E[β] is measured here on a text, at temperature 1. The engine does not speculate: this says whether it
would pay.

R scored tokens, r of them at once, V vocabulary, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ... import DataError
from ...configs.typed import check
from ...parallel.mesh import Mesh
from ..data.rows import Batch
from ..data.tokenizer import Tokenizer
from ..models.context import VarlenContext
from ..models.decoder import Decoder
from ..train.part import part_of
from .perplexity import cut, evaluating, pack

LOGITS = 1 << 24  # of one model, that exist at once


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Of a draft by a target.

    Attributes:
        rate: α, the mean over tokens of Σ_v min(p, q).
        greedy: share of tokens for which both find the same one most probable (speculation at temperature 0).
        tokens: predictions that were compared.
    """

    rate: float
    greedy: float
    tokens: int

    def length(self, drafted: int) -> float:
        """Tokens that one pass of the target yields, of `drafted` proposed and its own one: (1 - α^(γ+1)) / (1 - α).

        Source: eq. 1, which takes acceptances at neighbouring tokens as independent.
        """
        return sum(self.rate**taken for taken in range(drafted + 1))


@torch.no_grad()
def acceptance(
    target: Decoder, draft: Decoder, tokenizer: Tokenizer, documents: Sequence[str], *, seq_len: int, batch: int = 4
) -> Acceptance:
    """Compare two models' distributions of every next token of `documents`.

    Args:
        target, draft: decoder-only, of the tokenizer's vocabulary; evaluated in evaluation mode, without capacities.
        seq_len: tokens of a window, at most either model's.
        batch: windows at once.

    Raises:
        ConfigError: the vocabularies differ, or `seq_len` does not fit. DataError: the documents hold no text.
    """
    names, fix = {"model": target, "draft": draft}, "use a draft of the same tokenizer"
    rule = f"must be the vocabulary of the target ({target.cfg.vocab_size})"
    check(draft.cfg.vocab_size == target.cfg.vocab_size, "draft", draft.cfg.vocab_size, rule, fix)
    for name, model in names.items():
        rule, longest = "has an encoder: drafts are of decoders", model.cfg.max_seq_len
        check(model.cfg.encoder is None, name, "encoder-decoder", rule, "use a decoder-only model")
        check(seq_len <= longest, "seq_len", seq_len, f"can not exceed {name}'s max_seq_len ({longest})", "lower it")
    if not any(documents):
        raise DataError("the documents hold no text: give some")
    ids = [np.append(part, tokenizer.eos_id) for part in tokenizer.encode_batch(documents)]
    windows, at_once = cut(ids, seq_len, seq_len), max(LOGITS // target.cfg.vocab_size, 1)
    taken = same = tokens = 0.0
    with evaluating(target), evaluating(draft):
        for first in range(0, len(windows), batch):
            packed = pack(windows[first : first + batch], 1, tokenizer.eos_id)
            ours, theirs = (_Read.of(model, packed) for model in (target, draft))
            for rows_r in (packed.targets_T >= 0).nonzero().flatten().split(at_once):
                p_rV, q_rV = ours.probabilities(rows_r), theirs.probabilities(rows_r)
                taken += float(torch.minimum(p_rV, q_rV).sum(dtype=torch.float64))
                same += float((p_rV.argmax(-1) == q_rV.argmax(-1)).sum())
                tokens += len(rows_r)
    return Acceptance(rate=taken / tokens, greedy=same / tokens, tokens=int(tokens))


@dataclass(frozen=True)
class _Read:
    """What a model has made of some tokens, before its head."""

    model: Decoder
    x_TD: Tensor
    ctx: VarlenContext

    @classmethod
    def of(cls, model: Decoder, batch: Batch) -> "_Read":
        part = part_of(batch, Mesh.alone(model.device), dropless=True)
        return cls(model, model.hidden(part.tokens_T, part.positions_A, part.ctx), part.ctx)

    def probabilities(self, rows_r: Tensor) -> Tensor:
        """Of every next token, [r, V] float32."""
        self.ctx.logit_rows = rows_r.to(self.x_TD.device)
        return self.model.logits(self.x_TD, self.ctx).float().softmax(-1)
