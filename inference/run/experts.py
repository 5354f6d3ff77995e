"""Pages of routing: which experts every cached token went to, kept beside its keys and values.

They lie in the blocks and slots of the KV cache, so a prefix hit brings the routing of the tokens that it skips, and
chunks, preemption and forks ask nothing more of the scheduler. Two readers: requests that want their experts reported,
and `moe_capacity=trained`, where a chunk must know how many slots its request's earlier tokens have taken.

T tokens, B requests, S spans (a request's tokens within one block), N slots, L MoE layers of the decoder, K choices,
E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...configs.typed import check
from ...kernels import store_routes
from ...kernels.memory import zeros
from ...moe.config import ModelConfig
from ...moe.routing.record import Decision, Routing
from ...moe.routing.registry import ROUTERS
from ..core.step import Scheduled


def check_routing(model: ModelConfig, moe_capacity: str) -> None:
    """Refuse what serving can not route as the trainer's evaluation does.

    Raises:
        ConfigError: a router that looks at later tokens; `trained` where there is no capacity that a chunk could know.
    """
    moe, fix = model.moe, "use moe_capacity=dropless"
    check(moe_capacity == "dropless" or moe is not None, "moe_capacity", moe_capacity, "needs a model of experts", fix)
    if moe is None:
        return
    rule = "chooses among tokens that serving has not seen yet, so a served token would get other experts"
    other = "evaluate this model, or train with another router"
    check(ROUTERS[moe.router].causal, "moe.router", moe.router, rule, other)
    known = moe.capacity_tokens is not None or moe.eval_capacity_factor is None
    rule = "needs moe.capacity_tokens, the training row length: without it capacity follows from the length at hand"
    check(moe_capacity == "dropless" or known, "moe_capacity", moe_capacity, rule, fix)


@dataclass(frozen=True, kw_only=True)
class Spans:
    """A step's tokens by the block that they lie in.

    Attributes:
        span_T: int64 span of each token; padding, of which nothing is kept, is given to the first.
        owner_S: int64 request of each span.
        first_B: int64 each request's first span.
        ended_N: int64 spans that fill their block, and `blocks_N`, these blocks.
    """

    span_T: Tensor
    owner_S: Tensor
    first_B: Tensor
    ended_N: Tensor
    blocks_N: Tensor

    @staticmethod
    def of(items: Sequence[Scheduled], tokens: int, block_size: int, device: torch.device) -> "Spans":
        """Of a step's requests, whose tokens are followed by padding up to `tokens`."""
        span: list[int] = []
        owner: list[int] = []
        first, ended, blocks = [], [], []
        for request, item in enumerate(items):
            end = item.start + item.count
            first.append(len(owner))
            for block in range(item.start // block_size, -(-end // block_size)):
                last = (block + 1) * block_size
                span += [len(owner)] * (min(end, last) - max(item.start, last - block_size))
                if last <= end:
                    ended.append(len(owner))
                    blocks.append(item.block_table[block])
                owner.append(request)
        span += [0] * (tokens - len(span))

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return Spans(
            span_T=tensor(span), owner_S=tensor(owner), first_B=tensor(first), ended_N=tensor(ended),
            blocks_N=tensor(blocks),
        )  # fmt: skip


@dataclass(frozen=True)
class RoutedRows:
    """Where some consecutive tokens of a request went.

    Args:
        first: position of the first of them.
        ids_RLK: int [rows, L, K], as the pages have it.
    """

    first: int
    ids_RLK: np.ndarray


class ExpertPages:
    """The pages of one model; whoever computes a step asks `taken_before` first and calls `store` after.

    Args:
        model: an encoder's experts need no pages, because it reads whole inputs; a dense model's pages are empty.
        num_blocks, block_size: the KV cache's.
        counted: keep `taken`.

    Attributes:
        layers: ids of the decoder's MoE layers.
        ids: int16 (int32 beyond 2¹⁵ experts) [slots, L, K], the logical expert of each choice; −1 − expert where the
            choice went nowhere: it was dropped, or GShard's second was not wanted.
        taken: int32 [num_blocks, L, E], kept assignments of the sequence up to a full block's end; None unless counted.
    """

    def __init__(
        self, model: ModelConfig, num_blocks: int, block_size: int, device: torch.device, *, counted: bool
    ) -> None:
        experts, top_k = (model.moe.num_experts, model.moe.top_k) if model.moe else (0, 0)
        self.layers = decoder_layers(model)
        self.block_size = block_size
        slots, layers = num_blocks * block_size, len(self.layers)
        self.ids = zeros((slots, layers, top_k), id_dtype(experts), device)
        counters = num_blocks, layers, experts
        self.taken = torch.zeros(counters, dtype=torch.int32, device=device) if counted else None

    def taken_before(self, items: Sequence[Scheduled]) -> Tensor | None:
        """int32 [B, L, E]: assignments that each request's tokens before its `start` have kept; None unless counted.

        The last full block before knows all up to its end; the slots of the block that is filled in part are counted.
        """
        if self.taken is None:
            return None
        size, device = self.block_size, self.ids.device
        full = [item.start // size for item in items]
        blocks = [item.block_table[i - 1] if i else 0 for item, i in zip(items, full, strict=True)]
        slots = [
            (request, item.block_table[i] * size + offset)
            for request, (item, i) in enumerate(zip(items, full, strict=True))
            for offset in range(item.start - i * size)
        ]
        owner_N, slots_N = torch.tensor(slots, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        known_B = torch.tensor(full, device=device) > 0
        before_BLE = self.taken[torch.tensor(blocks, dtype=torch.int64, device=device)] * known_B[:, None, None]
        return before_BLE + self._count(self.ids[slots_N], owner_N, len(items))

    def by_layer(self, taken_BLE: Tensor | None) -> Mapping[int, Tensor] | None:
        """Layer id → int32 [B, E], as routers read it."""
        return None if taken_BLE is None else dict(zip(self.layers, taken_BLE.unbind(1), strict=True))

    def store(
        self,
        items: Sequence[Scheduled],
        slots_T: Tensor,
        routings: Mapping[int, Routing | Decision],
        taken_BLE: Tensor | None,
    ) -> None:
        """Write where a step's tokens went.

        Args:
            items: the step's requests in the order of their tokens.
            slots_T: int64, where each token's keys and values went; the null block's for padding.
            routings: layer id → routing of these tokens.
            taken_BLE: what `taken_before` gave; None unless counted.
        """
        if not self.layers:
            return
        decided = [routings[layer] for layer in self.layers]
        ids, kept = [r.ids_TK for r in decided], [r.kept_TK for r in decided]
        store_routes(self.ids, slots_T, ids, kept)
        if self.taken is None or taken_BLE is None:
            return
        ids_TLK, kept_TLK = torch.stack(ids, 1), torch.stack(kept, 1)
        ids_TLK = torch.where(kept_TLK, ids_TLK, -1 - ids_TLK)
        spans = Spans.of(items, len(slots_T), self.block_size, self.ids.device)
        if not spans.ended_N.numel():
            return
        counts_SLE = self._count(ids_TLK, spans.span_T, len(spans.owner_S))
        until_SLE = counts_SLE.cumsum(0, dtype=torch.int32)
        earlier_BLE = (until_SLE - counts_SLE)[spans.first_B]
        upto_SLE = taken_BLE[spans.owner_S] + until_SLE - earlier_BLE[spans.owner_S]
        self.taken[spans.blocks_N] = upto_SLE[spans.ended_N]

    def report(self, items: Sequence[Scheduled]) -> dict[str, RoutedRows]:
        """Request id → where its tokens went, of each request that asks: those that its caller does not have yet."""
        asking = [item for item in items if item.request.params.routed_experts]
        if not asking:
            return {}
        size = self.block_size
        spans = [(item, range(item.request.num_reported_tokens, item.start + item.count)) for item in asking]
        slots = [item.block_table[at // size] * size + at % size for item, span in spans for at in span]
        ids_NLK = self.ids[torch.tensor(slots, dtype=torch.int64, device=self.ids.device)].cpu()
        rows = zip(spans, ids_NLK.split([len(span) for _, span in spans]), strict=True)
        return {item.request.id: RoutedRows(span.start, part_RLK.numpy()) for (item, span), part_RLK in rows}

    @property
    def no_rows(self) -> np.ndarray:
        """[0, L, K], of the type of a report's rows."""
        return self.ids[:0].cpu().numpy()

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each (from, to): a fork's partly filled block becomes its own."""
        if not copies:
            return
        source, target = torch.tensor(copies, device=self.ids.device).unbind(1)
        pages = self.ids.view(-1, self.block_size, *self.ids.shape[1:])
        pages[target] = pages[source]
        if self.taken is not None:
            self.taken[target] = self.taken[source]

    def _count(self, ids_NLK: Tensor, owner_N: Tensor, owners: int) -> Tensor:
        """int32 [owners, L, E]: the kept assignments among `ids` of each owner."""
        assert self.taken is not None
        layers, experts = self.taken.shape[1:]
        layer_L1 = torch.arange(layers, device=ids_NLK.device)[:, None]
        place_NLK = (owner_N[:, None, None] * layers + layer_L1) * experts + ids_NLK.clamp(min=0)
        counts_N = torch.zeros(owners * layers * experts, dtype=torch.int32, device=ids_NLK.device)
        return counts_N.scatter_add_(0, place_NLK.flatten(), (ids_NLK >= 0).flatten().int()).view(
            owners, layers, experts
        )


def id_dtype(num_experts: int) -> torch.dtype:
    """The smallest type that holds every expert and every −1 − expert."""
    return torch.int16 if num_experts <= 2**15 else torch.int32


def decoder_layers(model: ModelConfig) -> tuple[int, ...]:
    """Ids of the decoder's MoE layers."""
    return tuple(layer for layer in model.moe_layers if layer < model.layers)


def page_bytes(model: ModelConfig, block_size: int, *, counted: bool) -> int:
    """Bytes of one block's pages."""
    if model.moe is None:
        return 0
    layers, moe = len(decoder_layers(model)), model.moe
    ids = block_size * moe.top_k * id_dtype(moe.num_experts).itemsize
    return layers * (ids + (4 * moe.num_experts if counted else 0))
