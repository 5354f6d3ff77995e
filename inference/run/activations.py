"""What one step takes beside weights and cache at its worst, in bytes, from the model's shapes alone.

The parts of a forward pass come one after another, so the peak is what lasts through all of it and the largest of
attention, a feed-forward network, an expert stack and the logits. Each is counted as the forms in `kernels/torch_ops`
have it, with the temporaries that live together; attention in C++ has none.

T tokens of a step, B requests, L longest sequence, D width, H heads, G kv heads, d head size, F hidden width, E
experts, K choices, V vocabulary, w bytes of a number, W of one in the precision of softmax, norms and routers.
"""

from dataclasses import dataclass

import torch

from ...kernels.torch_ops.attention import EXPLICIT
from ...moe.config import ModelConfig
from ...moe.shapes import KVForm
from ..config import EngineConfig
from .experts import decoder_layers
from .prompt import LOGITS

INDEX = 8
"""Bytes of an int64."""
SAMPLING = 56
"""Bytes that the sampler has at once for each logit of a row: copies, sorted values and indices, float64 sums."""
HIDDEN = {"swiglu": 4, "swiglu_clamped": 8, "gelu": 2, "relu": 2}
"""Hidden widths that an activation function has at once, its operand and result included."""
GATHERED = 3
"""And that ranks have at most which gather those of a rounded layer: their own, all as they come, all in order."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The worst step.

    Args:
        model: its shapes.
        config: T and B.
        length: L, in tokens.
        dtype: of the weights.
        ranks: that divide the experts. All of them may send all of their tokens to the experts of one.
        tp: ranks that divide a step's tokens between the layers.
        replicas: each with a step of its own; rank 0 samples for all of them.
        in_place: attention reads the pages where they lie and writes its result alone.
    """

    model: ModelConfig
    config: EngineConfig
    length: int
    dtype: torch.dtype
    ranks: int = 1
    tp: int = 1
    replicas: int = 1
    in_place: bool = False

    @property
    def total(self) -> int:
        """The peak."""
        return self.lasting + max(self.attention, self.dense, self.experts, self.logits)

    @property
    def tokens(self) -> int:
        """T."""
        return self.config.max_num_batched_tokens

    @property
    def w(self) -> int:
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """W."""
        return max(self.w, 4)

    @property
    def lasting(self) -> int:
        """The residual stream, its norm and their temporaries, an encoder's result, and the record of all routings."""
        model, moe = self.model, self.model.moe
        streams = 4 if model.encoder is not None else 3
        each = model.width * (streams * self.w + 3 * self.wide)
        if moe is not None:
            sparse = len(decoder_layers(model))
            each += sparse * (2 * self.wide * moe.num_experts + (INDEX + self.wide + 2) * moe.top_k)
        return self.tokens * each

    @property
    def attention(self) -> int:
        """Projections, and the larger of one sequence's chunk and all sequences' next tokens."""
        model, latent = self.model, self.model.attention.latent
        query, keys = model.head_dim, 2 * model.kv_heads * model.head_dim
        if latent is not None:
            query += latent.rank + latent.rope_dim
            keys = latent.rank + latent.rope_dim if self.in_place else keys  # all heads read a token's one row
        projections = self.tokens * (model.heads * query + keys) * (3 * self.w + 3 * self.wide)
        if self.in_place:
            return projections
        step, batch = self.tokens, min(self.config.max_num_seqs, self.tokens)
        found = [self._attend(1, step, self.length), self._attend(batch, 1, self.length)]
        if model.encoder is not None:
            found.append(self._attend(1, step, step))
        return projections + max(found)

    def _attend(self, batch: int, queries: int, keys: int) -> int:
        """Attention of `batch` sequences with so many queries to so many keys each."""
        model, form, heads = self.model, KVForm.of(self.model), self.model.heads
        own, scores = model.attention, batch * queries * keys
        biased, fused = own.sinks or own.positions == "relative", form.key_dim == form.value_dim
        at = INDEX * (1 + (own.window is not None) + 2 * (own.positions == "relative")) + 2
        mask = self.wide + (self.wide + self.w % self.wide) * (heads // form.heads)
        written = heads * self.wide * (4 * biased + 3 * (not fused))
        found = scores * (at + mask + written)
        if self.w == 2 and not biased:  # short enough ones are written out, whatever the device
            short = min(scores, EXPLICIT // heads)
            found = max(found, short * (at + mask + heads * (self.wide + 2 * self.w)))
        kept = self.w + (5 if self.config.kv_dtype == "int8" else 0)
        row = 4 * INDEX + form.heads * (form.key_dim + form.value_dim) * (kept + self.w)
        return batch * keys * row + found

    @property
    def dense(self) -> int:
        """A dense feed-forward network."""
        gathers = self.tp > 1 and self.model.quantization is not None
        return self._feed(self.model.ffn_width, self.model.activation, GATHERED if gathers else 0)

    def _feed(self, hidden: int, activation: str, least: int = 0) -> int:
        return self.tokens * self.w * (max(HIDDEN[activation], least) * hidden + self.model.width)

    @property
    def rows(self) -> int:
        """Rows that one rank computes when all tokens of all ranks go to its experts."""
        moe = self.model.moe
        if moe is None:
            return 0
        return -(-self.tokens // self.tp) * self.ranks * min(moe.top_k, -(-moe.num_experts // self.ranks))

    @property
    def experts(self) -> int:
        """Router, rows in the experts' order, the experts of one rank with all of them, shared experts, and the sum.

        Rows that travel between ranks are there as they set out and as they arrive.
        """
        moe = self.model.moe
        if moe is None:
            return 0
        router = self.tokens * (self.wide * moe.width + (5 * self.wide + 2 * INDEX) * moe.num_experts)
        order = 6 * INDEX * self.rows
        travel = 0 if self.ranks == 1 else 4 * self.w * moe.width
        whole = self.ranks == 1 and moe.activation == "swiglu" and not moe.bias  # in one operation, rows where they are
        copies = (1 if whole else 3) * moe.width
        stack = self.w * (HIDDEN[moe.activation] * moe.expert_width * (1.5 if moe.bias else 1) + copies)
        shared = moe.shared_width or moe.shared_experts * moe.expert_width
        beside = self._feed(shared, moe.activation) + self.w * self.tokens * moe.width if shared else 0
        total = 3 * self.wide * self.tokens * moe.width
        return router + order + int(self.rows * (stack + travel)) + beside + total

    @property
    def logits(self) -> int:
        """Of every request, with what the sampler makes of them; before that a slice of a prompt's."""
        rows = min(self.config.max_num_seqs, self.tokens) * self.replicas
        slices = max(min(LOGITS, self.tokens * self.model.vocab_size), self.model.vocab_size)
        prompts = slices * (self.w + 3 * self.wide)
        return max(rows * self.model.vocab_size * (self.w + self.wide + SAMPLING), prompts)
