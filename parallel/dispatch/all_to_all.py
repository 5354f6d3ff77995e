"""Experts spread over ranks: rows travel to the rank of their expert and back (GShard 2006.16668 §3.3).

    dispatch    sort this rank's assignments by (chunk, expert), tell every rank how many rows each expert gets, and let
                all chunks set out
    combine     for each chunk: wait for it, compute, let its outputs set out; then wait for all and mix

So chunk i + 1 travels while chunk i is computed, chunk 0 beside whatever is computed between the two calls, and outputs
beside the chunks after them; the backward pass is the mirror image (`travel.py`).

Experts lie on the ranks in blocks, E / P each or (in serving) one more on the first ranks, so rows sorted by expert are
already sorted by destination. The counts of all ranks go to all ranks, once a layer and for all chunks: one collective
and one look of the host at the result, from which everybody also knows whether rounds are needed (`parts.py`) and how
many rows pass through a node. It is P * C * E numbers, little beside the rows. A rank that sends or receives nothing
takes part all the same.

In the worst case all ranks' tokens go to one rank's experts. A token's choices are different experts, so that rank then
holds M = min(K, L) * (tokens of all P ranks) rows: of D numbers as they come and as they leave, and of 3 F (SwiGLU) or
2 F hidden units between. In serving, M * (2 D + 3 F) numbers with P * max_num_batched_tokens tokens.

When some rank would hold more rows than `parallel.exchange_rows`, each chunk goes in rounds, one after another: there,
compute, back. A round keeps nothing for the backward pass but the rows that this rank sent; there it is exchanged and
computed once more.

T tokens, D width, E experts of the layer, L experts held here, P ranks, C chunks, K choices, N kept assignments sent,
M rows received.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels import combine, permute, sort_by_expert
from ..mesh import Mesh
from ..process import naming
from .local import Experts, ends
from .parts import Groups, by_rank, crowded, cut, legs, regroup, shares
from .traffic import Traffic
from .travel import Journey, Leg, way_back


@dataclass(frozen=True)
class Part:
    """One chunk, or a round of it: the way of its rows, and where those of each expert end when they have arrived."""

    legs: list[Leg]
    ends_L: Tensor


class Caravan:
    """The rows of a part and their keys, if there are any, on the way together."""

    def __init__(self, part: Part, rows_ND: Tensor, key_N: Tensor | None, traffic: Traffic) -> None:
        self.part = part
        self.journeys = [Journey(some, part.legs, traffic) for some in (rows_ND, key_N) if some is not None]

    def advance(self) -> None:
        """On to the next leg, if there is one."""
        for journey in self.journeys:
            journey.advance()

    def compute(self, experts: Experts) -> Tensor:
        """Wait until all have arrived; the experts' outputs."""
        rows_MD, *key_M = [journey.arrive() for journey in self.journeys]
        return experts(rows_MD, self.part.ends_L, key_M[0] if key_M else None)


@dataclass(frozen=True)
class Sent:
    """What a layer exchanges.

    Attributes:
        caravans: the chunks on their way; none when they go in rounds.
        rounds: part, rows and keys that are still here; none when they do not go in rounds.
        order_N, slot_TK: as in `Dispatched`, of the rows that this rank sends, part after part.
    """

    caravans: list[Caravan]
    rounds: list[tuple[Part, Tensor, Tensor | None]]
    order_N: Tensor
    slot_TK: Tensor


class AllToAllDispatcher:
    """The dispatcher of a layer whose experts are spread; `dispatch` and `combine` are collective over its ranks.

    Args:
        mesh: the layout: who holds the experts, and how `parallel.chunks`, `exchange_rows` and `node` have rows travel.
        num_experts: E, of the whole layer.
        traffic: where what travels is counted.
    """

    def __init__(self, mesh: Mesh, num_experts: int, traffic: Traffic) -> None:
        self.num_experts, self.traffic = num_experts, traffic
        self.shares = shares(num_experts, mesh.ep_size)
        self.chunks, self.limit = mesh.exchange.chunks, mesh.exchange.rows
        self.groups = Groups(mesh.group("ep"), mesh.groups.get("near"), mesh.groups.get("far"))

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, kept_TK: Tensor, num_experts: int, key_TK: Tensor | None = None
    ) -> Sent:
        """As `LocalDispatcher.dispatch`."""
        assert num_experts == self.num_experts, "the layer and its dispatcher disagree on the number of experts"
        tokens, device = len(ids_TK), x_TD.device
        chunk_T = torch.arange(tokens, device=device) * self.chunks // max(tokens, 1)
        section_TK = ids_TK + num_experts * chunk_T[:, None]
        order_N, slot_TK, counts = sort_by_expert(section_TK, kept_TK, num_experts * self.chunks)
        counts_PCE = self._all_counts(counts)
        in_rounds = crowded(counts_PCE, self.limit)
        rounds = cut(counts_PCE, self.limit if in_rounds else None)
        if in_rounds:
            order_N = order_N[regroup(rounds, dist.get_rank(self.groups.ep)).to(device)]
            slot_TK = torch.full_like(slot_TK, -1).view(-1).index_copy_(
                0, order_N, torch.arange(len(order_N), device=device)
            ).view_as(slot_TK)  # fmt: skip
        parts = [self._part(counts_PPL, device) for each in rounds for counts_PPL in each]
        sizes = [sum(part.legs[0].sent) for part in parts]
        rows = permute(x_TD, order_N, slot_TK).split(sizes)
        keys = [None] * len(parts) if key_TK is None else key_TK.flatten()[order_N].split(sizes)
        loads = list(zip(parts, rows, keys, strict=True))
        if in_rounds:
            return Sent([], loads, order_N, slot_TK)
        return Sent([Caravan(*load, self.traffic) for load in loads], [], order_N, slot_TK)

    def combine(self, sent: Sent, experts: Experts, weights_TK: Tensor) -> Tensor:
        """As `LocalDispatcher.combine`, with the experts of all ranks."""
        if sent.caravans:
            outputs = self._overlapped(sent.caravans, experts)
        else:
            again = partial(checkpoint, self._round, experts, use_reentrant=False, preserve_rng_state=False)
            outputs = [again(*load) for load in sent.rounds]
        y_ND = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return combine(y_ND, weights_TK, sent.order_N, sent.slot_TK)

    def _overlapped(self, caravans: list[Caravan], experts: Experts) -> list[Tensor]:
        """Outputs of all chunks: while one is computed, later ones come and earlier ones return."""
        returning: list[Journey] = []
        caravans[0].advance()
        for index, caravan in enumerate(caravans):
            for later in caravans[index + 1 : index + 2]:
                later.advance()
            y_MD = caravan.compute(experts)
            for earlier in returning[-1:]:
                earlier.advance()
            returning.append(Journey(y_MD, way_back(caravan.part.legs), self.traffic))
        returning[-1].advance()
        return [journey.arrive() for journey in returning]

    def _round(self, experts: Experts, part: Part, rows_ND: Tensor, key_N: Tensor | None) -> Tensor:
        """Outputs of one round: there, compute, back."""
        y_MD = Caravan(part, rows_ND, key_N, self.traffic).compute(experts)
        return Journey(y_MD, way_back(part.legs), self.traffic).arrive()

    def _all_counts(self, counts: Tensor) -> Tensor:
        """counts_PCE of all ranks, on the CPU, as many columns for each of them."""
        ranks = self.groups.ep.size()
        everybody = counts.new_empty(ranks, len(counts))
        with naming("gathering of expert counts"):
            dist.all_gather(list(everybody), counts, group=self.groups.ep)
        return by_rank(everybody.cpu().view(ranks, self.chunks, self.num_experts))

    def _part(self, counts_PPL: Tensor, device: torch.device) -> Part:
        rank = dist.get_rank(self.groups.ep)
        arriving_L = counts_PPL[:, rank].sum(0)[: self.shares[rank]]
        return Part(legs(counts_PPL, self.groups, device), ends(arriving_L).to(device))


def traffic_of(model: nn.Module) -> Traffic | None:
    """Where `model` counts what its layers exchange; None when none of its experts are spread."""
    dispatchers = (getattr(module, "dispatcher", None) for module in model.modules())
    return next((found.traffic for found in dispatchers if isinstance(found, AllToAllDispatcher)), None)
