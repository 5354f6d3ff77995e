"""How many ranks do what: the sizes of the parallel dimensions, and their check against the world. No torch here.

    rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank

The dp * cp * tp ranks that share one pipeline rank are a STAGE. The experts of its layers are spread over the same
ranks, arranged a second time as `edp` rows of `ep` neighbours: a row holds all experts once, a column holds `edp`
replicas of the same experts.
"""

from dataclasses import dataclass
from typing import Literal

from ..configs.typed import check, check_choices

DIMENSIONS = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A `ParallelConfig` that fits its world.

    Attributes:
        dp: ranks of a stage that read different rows.
        cp: ranks among which the tokens of those rows are divided.
        tp: ranks that divide heads and hidden units (and, between layers, tokens once more).
        pp: ranks among which the layers are divided.
        ep, edp: the same dp * cp * tp ranks, as the experts see them.
    """

    dp: int
    ep: int
    edp: int
    tp: int = 1
    pp: int = 1
    cp: int = 1

    @property
    def stage(self) -> int:
        """Ranks of one stage."""
        return self.dp * self.cp * self.tp

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.stage

    @property
    def pieces(self) -> int:
        """Equal pieces into which a micro-batch's tokens are divided: two a context rank, each in tp parts."""
        return (2 * self.cp if self.cp > 1 else 1) * self.tp

    def place(self, rank: int) -> dict[str, int]:
        """Where `rank` stands in every dimension."""
        outer, tp = divmod(rank, self.tp)
        outer, cp = divmod(outer, self.cp)
        pp, dp = divmod(outer, self.dp)
        edp, ep = divmod(rank % self.stage, self.ep)
        return {"pp": pp, "dp": dp, "cp": cp, "tp": tp, "edp": edp, "ep": ep}


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How rows travel to experts, as `ParallelConfig` says; `node` only if there are several nodes of several ranks."""

    chunks: int = 1
    rows: int | None = None
    node: int | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel dimensions, world = pp * dp * cp * tp with ep dividing dp * cp * tp, and how they work.

    Attributes:
        dp: data-parallel ranks; None = what the other dimensions leave of the world.
        ep: ranks over which the experts of one layer are spread, carved out of the dp * cp * tp ranks of a stage.
        tp: tensor-parallel ranks: heads and hidden units are divided, and the tokens between them.
        pp: pipeline ranks: the layers are divided.
        cp: context-parallel ranks: the tokens of a row are divided, attention gathers keys and values.
        fsdp: FSDP2 in place of DDP: parameters, gradients and states are spread over the ranks that replicate them.
        zero: ZeRO stage of engine=deepspeed: 1 spreads the optimizer's states over the ranks, 2 the gradients too, 3
            the parameters too.
        schedule: how a pipeline orders micro-batches: all forward, then all backward, or one of each in turn.
        virtual: parts of the model that a pipeline rank holds; above 1 the schedule interleaves them.
        chunks: parts in which a MoE layer's tokens are exchanged, so that one travels while another is computed.
        exchange_rows: rows that an expert-parallel rank holds at once; more are exchanged and computed in rounds, and
            again in the backward pass. None = no limit.
        node: ranks of a node, when rows are to travel within nodes first and then between them; None = in one step.
        timeout: seconds until a collective gives up on a lost peer.
    """

    dp: int | None = None
    ep: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    fsdp: bool = False
    zero: Literal[1, 2, 3] = 1
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    virtual: int = 1
    chunks: int = 1
    exchange_rows: int | None = None
    node: int | None = None
    timeout: float = 120.0

    def __post_init__(self) -> None:
        check_choices(self, "parallel")
        for name in ("ep", "tp", "pp", "cp", "virtual", "chunks"):
            size = getattr(self, name)
            check(size >= 1, f"parallel.{name}", size, "must be at least 1", f"use parallel.{name}=1")
        for name, none in (("dp", "for all ranks"), ("exchange_rows", "for no limit"), ("node", "for one step")):
            size = getattr(self, name)
            check(size is None or size >= 1, f"parallel.{name}", size, "must be at least 1", f"use null {none}")
        check(0 < self.timeout < float("inf"), "parallel.timeout", self.timeout, "must be positive seconds", "use 120")
        rule, fix = "divides a pipeline rank's layers, and there is one pipeline rank", "use parallel.pp=2 or more"
        check(self.virtual == 1 or self.pp > 1, "parallel.virtual", self.virtual, rule, fix)
        rule, fix = "orders a pipeline's micro-batches, and there is one pipeline rank", "use parallel.schedule=1f1b"
        check(self.schedule == "1f1b" or self.pp > 1, "parallel.schedule", self.schedule, rule, fix)
        rule, fix = "interleaves by 1f1b only", "use parallel.schedule=1f1b"
        check(self.virtual == 1 or self.schedule == "1f1b", "parallel.virtual", self.virtual, rule, fix)
        rule = f"must divide parallel.ep ({self.ep})"
        fits = self.node is None or self.ep % self.node == 0
        check(fits, "parallel.node", self.node, rule, "use null, or the ranks of one machine")

    def resolve(self, world: int, num_experts: int | None = None) -> Layout:
        """Fit the sizes to `world` ranks and a model of `num_experts` experts a layer (None: not checked).

        Raises:
            ConfigError: the sizes do not multiply to the world, or the experts can not be spread evenly.
        """
        others = self.pp * self.cp * self.tp
        product = " * ".join(f"parallel.{name} ({getattr(self, name)})" for name in ("pp", "cp", "tp"))
        named = next((name for name in ("tp", "pp", "cp") if getattr(self, name) > 1), "tp")
        rule = f"must fit the ranks: {product} must divide their number ({world})"
        check(world % others == 0, f"parallel.{named}", getattr(self, named), rule, f"use {_divisors(world)}")
        dp = world // others if self.dp is None else self.dp
        rest = f" / ({product})" if others > 1 else ""
        rule = f"must equal the number of ranks ({world}){rest}"
        fix = f"use parallel.dp={world // others} or start {dp * others} ranks"
        check(dp * others == world, "parallel.dp", dp, rule, fix)
        rows, none = self.exchange_rows, "is about rows that travel between ranks, and parallel.ep is 1"
        check(self.chunks == 1 or self.ep > 1, "parallel.chunks", self.chunks, none, "use parallel.ep=2 or more")
        check(rows is None or self.ep > 1, "parallel.exchange_rows", rows, none, "use parallel.ep=2 or more")
        rule = f"must be at least parallel.ep ({self.ep}), a row of every rank"
        check(rows is None or rows >= self.ep, "parallel.exchange_rows", rows, rule, "use thousands, or null")
        stage = world // self.pp
        rule = f"must divide the data-parallel ranks ({dp})" if stage == dp else f"must divide dp * cp * tp ({stage})"
        check(stage % self.ep == 0, "parallel.ep", self.ep, rule, f"use {_divisors(stage)}")
        if num_experts is not None:
            rule = f"must divide moe.num_experts ({num_experts})"
            check(num_experts % self.ep == 0, "parallel.ep", self.ep, rule, f"use {_divisors(num_experts)}")
        return Layout(dp=dp, ep=self.ep, edp=stage // self.ep, tp=self.tp, pp=self.pp, cp=self.cp)

    @property
    def exchange(self) -> Exchange:
        """How rows travel to experts."""
        node = None if self.node in (1, self.ep) else self.node
        return Exchange(chunks=self.chunks, rows=self.exchange_rows, node=node)


def _divisors(n: int) -> str:
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]
