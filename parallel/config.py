"""How many ranks do what: the sizes of the parallel dimensions, and their check against the world. No torch here."""

from dataclasses import dataclass
from typing import Literal

from ..configs.typed import check


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A `ParallelConfig` that fits its world: `dp` data-parallel ranks, seen a second time as `edp` x `ep`.

    Every rank reads its own part of the batch. For the experts the same ranks are arranged in `edp` rows of `ep`
    neighbours: a row holds all experts once, a column holds `edp` replicas of the same experts.
    """

    dp: int
    ep: int
    edp: int


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel dimensions; world = pp * dp * cp * tp, and ep divides dp * cp * tp.

    Attributes:
        dp: data-parallel ranks; None = what the other dimensions leave of the world.
        ep: ranks over which the experts of one layer are spread, carved out of the data-parallel ones.
        tp, pp, cp: tensor, pipeline and context parallelism; only 1 is built.
        zero: ZeRO stage of engine=deepspeed: 1 spreads the optimizer's states over the ranks, 2 the gradients too.
        timeout: seconds until a collective gives up on a lost peer.
    """

    dp: int | None = None
    ep: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    zero: Literal[1, 2] = 1
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name in ("ep", "tp", "pp", "cp"):
            size = getattr(self, name)
            check(size >= 1, f"parallel.{name}", size, "must be at least 1", f"use parallel.{name}=1")
        check(self.dp is None or self.dp >= 1, "parallel.dp", self.dp, "must be at least 1", "use null for all ranks")
        for name in ("tp", "pp", "cp"):
            size = getattr(self, name)
            check(size == 1, f"parallel.{name}", size, "is not built yet", f"use parallel.{name}=1 and more dp or ep")
        check(0 < self.timeout < float("inf"), "parallel.timeout", self.timeout, "must be positive seconds", "use 120")

    def resolve(self, world: int, num_experts: int | None = None) -> Layout:
        """Fit the sizes to `world` ranks and a model of `num_experts` experts a layer (None: not checked).

        Raises:
            ConfigError: the sizes do not multiply to the world, or the experts can not be spread evenly.
        """
        dp = world if self.dp is None else self.dp
        rule = f"must equal the number of ranks ({world})"
        check(dp == world, "parallel.dp", dp, rule, f"use parallel.dp={world} or start {dp} ranks")
        rule = f"must divide the data-parallel ranks ({dp})"
        check(dp % self.ep == 0, "parallel.ep", self.ep, rule, f"use {_divisors(dp)}")
        if num_experts is not None:
            rule = f"must divide moe.num_experts ({num_experts})"
            check(num_experts % self.ep == 0, "parallel.ep", self.ep, rule, f"use {_divisors(num_experts)}")
        return Layout(dp=dp, ep=self.ep, edp=dp // self.ep)


def _divisors(n: int) -> str:
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]
