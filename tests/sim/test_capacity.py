"""Capacity counters chained through blocks, under every plan that the scheduler makes: the plain double and the real
pages, both beside the canary cache, and both with mistakes that must show."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from turnout.inference.core.step import Scheduled, StepPlan
from turnout.inference.run.experts import ExpertPages
from turnout.moe import ModelConfig, MoEConfig
from turnout.moe.routing.record import Routing

from .capacity import CHOICES, EXPERTS, CapacityPages, place, went_alone
from .doubles import MODEL
from .simulator import Simulation

MOE = MoEConfig(width=8, expert_width=8, num_experts=EXPERTS, top_k=CHOICES, router="topk_softmax", every=1)
CONFIG = ModelConfig(
    vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn_width=8, max_seq_len=64, moe=MOE
)


class RealPages:
    """The engine's own pages, fed with the double's routers."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pages = ExpertPages(CONFIG, num_blocks, block_size, torch.device("cpu"), counted=True)

    def step(self, items: Sequence[Scheduled], values: Sequence[Sequence[int]]) -> None:
        pages, size = self.pages, self.pages.block_size
        pages.copy([item.copied for item in items if item.copied is not None])
        before = pages.taken_before(items)
        went, slots = [], []
        for item, own, taken in zip(items, values, before[:, 0].tolist(), strict=True):
            went += [place(value, taken) for value in own[item.start :]]
            slots += [item.block_table[at // size] * size + at % size for at in range(item.start, item.end)]
        went_TK = torch.tensor(went).view(-1, CHOICES)
        pages.store(items, torch.tensor(slots, dtype=torch.int64), {0: decided(went_TK)}, before)
        for item, own in zip(items, values, strict=True):
            table = torch.tensor(item.block_table)
            ids = pages.ids.view(-1, size, CHOICES)[table].flatten(0, 1)[: item.end].tolist()
            assert ids == went_alone(own), "capacity: a token went where it would not go alone"


def decided(went_TK: torch.Tensor) -> Routing:
    kept_TK = went_TK >= 0
    ids_TK = torch.where(kept_TK, went_TK, -1 - went_TK)
    nothing = torch.zeros(0)
    return Routing(
        ids_TK=ids_TK, weights_TK=nothing, wanted_TK=torch.ones_like(kept_TK), kept_TK=kept_TK,
        logits_TE=nothing,
    )  # fmt: skip


class WithPages(Simulation):
    def __init__(self, seed: int, pages: type = CapacityPages, **settings) -> None:
        super().__init__(seed, **settings)
        self.pages = pages(self.config.num_blocks, self.config.block_size)

    def _execute(self, plan: StepPlan) -> dict[str, int]:
        values = [MODEL.values(item.request, self._tokens(item)) for item in plan.scheduled]
        self.seen["dropped"] += sum(went < 0 for own in values for row in went_alone(own) for went in row)
        sampled = super()._execute(plan)
        self.pages.step(plan.scheduled, values)
        return sampled


@pytest.mark.parametrize(("pages", "seeds"), [(CapacityPages, range(200)), (RealPages, range(24))])
def test_counters_are_those_of_each_request_alone(pages, seeds):
    seen = {"dropped": 0, "preempted": 0, "hit": 0, "chunked": 0, "copied": 0}
    for seed in seeds:
        simulation = WithPages(seed, pages)
        simulation.run()
        for name in seen:
            seen[name] += simulation.seen[name]
    assert all(seen.values()), seen


@pytest.mark.full
def test_counters_over_thousands_of_seeds():
    run_all(CapacityPages, range(3000))


class ForgetsThePartlyFilled(CapacityPages):
    """A chunk that starts within a block counts from the block's start."""

    def before(self, item: Scheduled) -> list[int]:
        full = item.start // self.block_size
        return list(self.taken[item.block_table[full - 1]] or ()) if full else [0] * EXPERTS


class ForgetsTheHit(CapacityPages):
    """A prefix hit begins with empty counters."""

    def before(self, item: Scheduled) -> list[int]:
        fresh = item.start == item.request.num_cached_tokens
        return [0] * EXPERTS if fresh else super().before(item)


class ByRequest(CapacityPages):
    """Counters are kept by request, and survive its preemption."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.kept: dict[str, list[int]] = {}

    def before(self, item: Scheduled) -> list[int]:
        return self.kept.setdefault(item.request.id, super().before(item))


class StaleIds(CapacityPages):
    """What a slot held before is read as its own."""

    def step(self, items: Sequence[Scheduled], values: Sequence[Sequence[int]]) -> None:
        before = list(self.ids)
        super().step(items, values)
        self.ids = [old or new for old, new in zip(before, self.ids, strict=True)]


class NoCopy(CapacityPages):
    """A fork reads what its own block held before."""

    def step(self, items: Sequence[Scheduled], values: Sequence[Sequence[int]]) -> None:
        super().step([replace(item, copied=None) for item in items], values)


class RealWithoutPartlyFilled(RealPages):
    """Only full blocks count."""

    def step(self, items: Sequence[Scheduled], values: Sequence[Sequence[int]]) -> None:
        count, self.pages._count = self.pages._count, lambda ids, owner, owners: 0 * count(ids, owner, owners)
        taken_before = self.pages.taken_before
        before = taken_before(items)
        self.pages._count, self.pages.taken_before = count, lambda _: before
        super().step(items, values)
        self.pages.taken_before = taken_before


@pytest.mark.parametrize(
    "pages", [ForgetsThePartlyFilled, ForgetsTheHit, ByRequest, StaleIds, NoCopy, RealWithoutPartlyFilled]
)
def test_the_simulator_finds(pages):
    with pytest.raises(AssertionError, match=r"^capacity"):
        run_all(pages, range(60))


def run_all(pages: type, seeds: range) -> None:
    for seed in seeds:
        WithPages(seed, pages).run()
