"""Serving's side of the model's `Context`: keys and values go to paged slots, attention reads through block tables.

The counterpart of training's `VarlenContext`; the model can not tell them apart. Routing is dropless and every request
is a group of its own, so a request never feels its batch-mates. T tokens, H heads, d head size.
"""

from torch import Tensor

from ...kernels.ops import paged_attention, store_kv
from ...moe.layers.context import AttentionSpec, Heads
from ...moe.routing.record import RouteContext, Routing
from .batch import Batch
from .kv import KVCache


class PagedContext:
    """The surroundings of one step's forward pass.

    Attributes:
        routings: layer id → Routing of this step.
    """

    def __init__(self, batch: Batch, cache: KVCache) -> None:
        self.route = RouteContext(
            cu_groups=batch.cu_q_B1, token_ids_T=batch.tokens_T, dropless=True, propagate_nan=True
        )
        self.logit_rows: Tensor | None = batch.logit_rows_R
        self.routings: dict[int, Routing] = {}
        self._batch, self._cache = batch, cache

    def attend(self, spec: AttentionSpec, q_THd: Tensor, kv: Heads) -> Tensor:
        """Store this step's keys and values, then attend to all of each sequence's."""
        assert spec.causal, "a paged sequence is read from left to right"
        batch, (keys, values) = self._batch, self._cache.layer(spec.layer)
        store_kv(kv.k, kv.v, keys, values, batch.slots_T)
        return paged_attention(
            q_THd,
            keys,
            values,
            batch.block_tables_BM,
            batch.context_lens_B,
            batch.cu_q_B1,
            scale=spec.scale,
            window=spec.window,
        )

    def observe(self, layer: int, routing: Routing) -> None:
        self.routings[layer] = routing
