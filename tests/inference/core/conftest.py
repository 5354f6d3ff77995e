"""A scheduler small enough to follow by hand: blocks of 4 tokens, and a model that always says 7."""

import zlib
from collections.abc import Sequence
from typing import Any

import pytest

from turnout.inference.config import EngineConfig
from turnout.inference.core.blocks import BlockManager
from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.scheduler import Scheduler
from turnout.inference.core.step import StepPlan
from turnout.tests.sim.doubles import FakeClock

TOKEN = 7


class Bench:
    """A scheduler with its blocks and clock.

    Args:
        usable: blocks besides the null block.
        config: EngineConfig's fields.
    """

    def __init__(self, usable: int = 16, **config: Any) -> None:
        self.config = EngineConfig(**{"block_size": 4, "max_num_batched_tokens": 64, "num_blocks": usable + 1} | config)
        self.clock = FakeClock()
        caching = self.config.enable_prefix_caching
        self.blocks = BlockManager(usable + 1, self.config.block_size, enable_prefix_caching=caching)
        self.scheduler = Scheduler(self.config, self.blocks, self.clock)

    def request(self, name: str, prompt: int | Sequence[int] = 5, max_tokens: int | None = 3, **fields: Any) -> Request:
        """A request; a prompt given as a length is one of its own, shared with nobody of another name."""
        if isinstance(prompt, int):
            first = zlib.crc32(name.encode()) << 20
            prompt = [first + i for i in range(prompt)]
        names = ("min_tokens", "ignore_eos", "stop_token_ids")
        params = {key: fields.pop(key) for key in names if key in fields}
        return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), self.clock.now, **fields)

    def add(self, name: str, prompt: int | Sequence[int] = 5, max_tokens: int | None = 3, **fields: Any) -> Request:
        request = self.request(name, prompt, max_tokens, **fields)
        self.scheduler.add(request)
        return request

    def commit(self, plan: StepPlan, token: int = TOKEN) -> list[Request]:
        return self.scheduler.commit(plan, {item.request.id: token for item in plan.scheduled if item.samples})

    def step(self, token: int = TOKEN) -> dict[str, int]:
        """One step; returns how many tokens each request computed."""
        plan = self.scheduler.schedule()
        self.commit(plan, token)
        return {item.request.id: item.count for item in plan.scheduled}

    def drain(self) -> int:
        steps = 0
        while self.scheduler.requests:
            self.step()
            steps += 1
            assert steps < 1000, "no end in sight"
        return steps


@pytest.fixture
def bench() -> type[Bench]:
    return Bench
