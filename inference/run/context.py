"""Serving's side of the model's `Context`: keys and values go to paged slots, attention reads through block tables.

The counterpart of training's `VarlenContext`; the model can not tell them apart. Every request is a routing group of
its own, so a request never feels its batch-mates. T tokens, H heads, d head size, B requests, E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels.paging import paged_attention, store_kv
from ...moe.layers.context import AttentionSpec, Heads, Latent, Loss, Turns
from ...moe.layers.latent import absorb, release
from ...moe.routing.record import Decision, RouteContext, Routing
from .batch import Batch
from .kv import KVCache


class PagedContext:
    """The surroundings of one step's forward pass.

    Args:
        batch: the step.
        cache: keys and values of all sequences.
        memory: the encoder's hidden states [S, D] of `batch.memory.tokens_S`; None without an encoder.
        taken: layer id → slots [B, E] that each request's earlier tokens have taken; None = dropless.

    Attributes:
        tokens_T: int64 ids of the tokens that this rank has between the layers.
        routings: layer id → Routing of this step.
    """

    def __init__(
        self, batch: Batch, cache: KVCache, memory: Tensor | None = None, taken: Mapping[int, Tensor] | None = None
    ) -> None:
        self.route = RouteContext(
            cu_groups=batch.cu_q_B1,
            valid_T=batch.valid_T,
            token_ids_T=batch.tokens_T,
            dropless=taken is None,
            taken=taken,
            propagate_nan=True,
        )
        self.tokens_T = batch.tokens_T
        self.logit_rows: Tensor | None = batch.logit_rows_R
        self.memory = memory
        self.loss: Loss | None = None
        self.routings: dict[int, Routing] = {}
        self.turns: Turns = {}
        self._batch, self._cache = batch, cache

    def attend(
        self,
        spec: AttentionSpec,
        q_THd: Tensor,
        kv: Heads | Latent,
        sinks_H: Tensor | None = None,
        bias_HR: Tensor | None = None,
    ) -> Tensor:
        """Store this step's keys and values, then attend to all of each sequence's.

        Latents are stored as they are and met by absorbed queries, in prefill as in decoding: one form, whatever the
        chunks.
        """
        batch, (keys, values) = self._batch, self._cache.layer(spec.layer)
        scales_k, scales_v = self._cache.scales(spec.layer)
        slots, tables_BM, lens_B = batch.slots_T, batch.block_tables_BM, batch.context_lens_B
        if spec.cross:
            assert batch.memory is not None, "an encoder's model is given an encoder's batch"
            slots, tables_BM, lens_B = batch.memory.slots_S, batch.memory.tables_BM, batch.memory.lens_B
        if isinstance(kv, Latent):
            store_kv(torch.cat((kv.c, kv.k_rope), -1)[:, None], None, keys, None, slots)
            q_THd = absorb(q_THd, kv)
        else:
            store_kv(kv.k, kv.v, keys, values, slots, scales_k, scales_v)
        o_THd = paged_attention(
            q_THd,
            keys,
            values,
            tables_BM,
            lens_B,
            batch.cu_q_B1,
            scale=spec.scale,
            causal=spec.causal,
            window=spec.window,
            sinks_H=sinks_H,
            bias_HR=bias_HR,
            scales_k=scales_k,
            scales_v=scales_v,
        )
        return release(o_THd, kv) if isinstance(kv, Latent) else o_THd

    def observe(self, layer: int, routing: Routing) -> None:
        self.routings[layer] = routing

    def decisions(self) -> Mapping[int, Routing | Decision]:
        """Layer id → where every token of the batch went."""
        return self.routings
