"""One step as data: which tokens of which requests are computed, and where their keys and values go."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's share of a step: compute its tokens `start` to `start + count - 1`.

    Args:
        request: read-only for the runner.
        start: position of the first token; the tokens before it are in the cache.
        count: at least 1.
        token_ids: the tokens; the last one is left out where the step launched before samples it.
        block_table: block of every `block_size` positions, at least as far as this step writes.
        samples: the last of these tokens is the sequence's last, so its logits give the next token.
        copied: (from, to) blocks to copy before anything is computed.
        memory_table: block of every `block_size` encoder tokens; empty without an encoder.
        encoded: encoder tokens to compute before these: all of the request's, or 0.
    """

    request: Request
    start: int
    count: int
    token_ids: Sequence[int]
    block_table: Sequence[int]
    samples: bool
    copied: tuple[int, int] | None = None
    memory_table: Sequence[int] = ()
    encoded: int = 0

    @property
    def cost(self) -> int:
        """Tokens of the budget."""
        return self.count + self.encoded

    @property
    def end(self) -> int:
        """Position after the last of these tokens; where it samples, that of the sampled one."""
        return self.start + self.count

    @property
    def suppressed_token_ids(self) -> frozenset[int]:
        """Tokens that must not be sampled next, because `min_tokens` are not out yet."""
        request = self.request
        early = self.end - len(request.prompt_token_ids) < request.params.min_tokens
        return request.stop_ids if early else frozenset()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, to be executed and then committed; nothing to do is a plan of 0 tokens, which is committed as well.

    Args:
        scheduled: in batch order, every request at most once.
        num_tokens: sum of their costs, at most the budget.
        preempted: requests that lost their blocks and wait again.
        expired: requests that had not started by their deadline and finished as "abort" (HTTP 503).
    """

    scheduled: tuple[Scheduled, ...]
    num_tokens: int
    preempted: tuple[Request, ...]
    expired: tuple[Request, ...]

    @property
    def copies(self) -> list[tuple[int, int]]:
        """(from, to) blocks to copy before anything is computed."""
        return [item.copied for item in self.scheduled if item.copied is not None]


@dataclass(slots=True)
class Draft:
    """A plan under construction."""

    budget: int
    block_size: int
    scheduled: dict[str, Scheduled] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)

    def give(self, request: Request) -> None:
        """Schedule as many of the request's missing tokens as the budget allows."""
        start, table, encoded = request.num_launched_tokens, tuple(request.block_table), request.num_unencoded_tokens
        missing = len(request.token_ids) + request.num_pending_tokens - start
        count = min(missing, self.budget - encoded)
        copied = None
        if request.copied_block is not None:
            copied = (request.copied_block, table[start // self.block_size])
        item = Scheduled(
            request=request,
            start=start,
            count=count,
            token_ids=request.token_ids[start : start + count],
            block_table=table,
            samples=count == missing and request.max_tokens > 0,
            copied=copied,
            memory_table=request.memory_table,
            encoded=encoded,
        )
        self.budget -= item.cost
        self.scheduled[request.id] = item

    def take_back(self, request: Request) -> None:
        """Unschedule a request; nothing is launched yet."""
        item = self.scheduled.pop(request.id, None)
        if item is not None:
            self.budget += item.cost
