"""`turnout plan`: what a run needs on every rank, and how fast it can be, before anything is allocated.

turnout plan experiment=switch_pydocs world=64 train.global_batch=512 accelerator=H100 network=ib400
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..configs.hardware import accelerator, network
from ..configs.typed import check
from ..moe import shapes
from ..moe.flops import experts_met, flops_per_token
from ..moe.train.config import RunConfig
from .cli import Options, parse, write_json
from .compose import GROUPS, ROOT_KEYS, compose
from .forecast import Forecast, layouts

SUMMARY = "what a run needs on every rank, and how fast it can be: turnout plan world=64"
HELP = """\
usage: turnout plan [experiment=NAME] [any setting of `turnout train`] [key=value ...]

Arithmetic on the configuration: nothing is allocated, no torch is loaded. Memory of one rank, FLOPs, bytes on the wire,
a bound on speed, and every layout that the batch and the experts allow. docs/planning.md says how it is computed.

  world=null         ranks; null = nproc, or the accelerators of this machine
  accelerator=H100   B200, H200, H100, A100, L40S, cpu, or a .yaml file
  network=ib400      between nodes: nvlink, ib400, ib200, eth100, eth25, eth10, or a .yaml file
  json=PATH          write the plan there

example: turnout plan experiment=switch_pydocs world=8 accelerator=H200 network=ib400
"""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """What `turnout plan` takes beside the settings of a run; see HELP."""

    world: int | None = None
    accelerator: str = "H100"
    network: str = "ib400"

    def __post_init__(self) -> None:
        check(self.world is None or self.world >= 1, "world", self.world, "must be at least 1", "use world=8")


def main(args: list[str]) -> int:
    """The verb."""
    own, words = split(args)
    _, options = parse(PlanOptions, own, words=())
    chip, net = accelerator(options.accelerator), network(options.network)
    composed = compose(words, options.world)
    config, world = composed.config, composed.world
    rule = "is not planned: ZeRO shards the optimizer's state its own way"
    check(config.engine == "native", "engine", config.engine, rule, "use engine=native")
    rule, fix = "is not planned: what it keeps is not in the formulas", "use train.recompute=none"
    check(config.train.recompute == "none", "train.recompute", config.train.recompute, rule, fix)
    check(not config.train.compile, "train.compile", config.train.compile, rule, "use train.compile=false")
    chosen = Forecast(config, config.layout(world), chip, net)
    table = list(layouts(config, world, chip, net))
    show(chosen, table, options)
    plan = {"accelerator": options.accelerator, "network": options.network, "parameters": parameters(config)}
    rows = [summary(forecast) for forecast in table]
    write_json(options.json, {**plan, **summary(chosen), **details(chosen), "layouts": rows})
    return 0


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The plan's own settings, and those of the run.

    Raises:
        ConfigError: a setting of neither looks like one of the plan's.
    """
    names = [field.name for field in fields(PlanOptions)]
    own: list[str] = []
    words: list[str] = []
    for word in args:
        key, equals, value = word.partition("=")
        (own if equals and key in names else words).append(word)
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
        known = key in names or key in ROOT_KEYS or key in GROUPS or not close
        check(known, key, value, "is not a setting", f"did you mean {''.join(close)}?")
    return own, words


def parameters(config: RunConfig) -> dict[str, float]:
    """Numbers in the whole model: total, active for one token, and by kind."""
    whole = shapes.shapes(config.model)
    experts = shapes.count({name: shape for name, shape in whole.items() if shapes.is_expert(name)})
    router = shapes.count({name: shape for name, shape in whole.items() if shapes.is_router(name)})
    total, moe = shapes.count(whole), config.model.moe
    idle = experts * (1 - experts_met(moe) / moe.num_experts) if moe else 0
    return {
        "total": total, "active": round(total - idle), "dense": total - experts - router,
        "experts": experts, "router": router,
    }  # fmt: skip


def summary(forecast: Forecast) -> dict[str, Any]:
    """A row of the table."""
    layout = forecast.layout
    return {
        "world": layout.dp, "ep": layout.ep, "edp": layout.edp, "bytes": forecast.memory.total,
        "worst_bytes": forecast.worst.total, "fits": forecast.fits, "seconds": forecast.seconds,
        "tokens_per_second": forecast.tokens_per_second, "mfu": forecast.mfu,
    }  # fmt: skip


def details(forecast: Forecast) -> dict[str, Any]:
    """Where the bytes, the FLOPs and the seconds of the chosen layout are."""
    model, train, held = forecast.config.model, forecast.config.train, forecast.memory
    return {
        "memory": {name: getattr(held, name) for name in MEMORY},
        "worst": {name: getattr(forecast.worst, name) for name in MEMORY},
        "kv_cache": {"token": held.kv_token, "sequence": held.kv_token * model.max_seq_len},
        "flops": {"token": flops_per_token(model, train.seq_len), "step": forecast.flops},
        "wire": {
            "dense": forecast.dense_bytes, "experts": forecast.expert_bytes,
            "forward": forecast.exchange_bytes, "backward": forecast.exchange_bytes,
        },
        "time": {
            "compute": forecast.compute_seconds, "memory": forecast.memory_seconds,
            "exposed": forecast.exposed_seconds,
        },
    }  # fmt: skip


MEMORY = {
    "weights": "weights, float32",
    "gradients": "gradients, float32",
    "optimizer": "optimizer state",
    "casts": "weights in train.dtype",
    "activations": "kept for backward",
    "logits": "gradient of the logits",
    "buffers": "all-to-all buffers",
    "workspace": "optimizer's workspace",
    "total": "peak",
}


def show(chosen: Forecast, table: Sequence[Forecast], options: PlanOptions) -> None:
    """The plan for a person, 100 columns wide."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100, highlight=False)
    console.print(f"{options.accelerator}, {options.network}: {chosen.layout.dp} ranks, ep {chosen.layout.ep}")
    for line in _lines(chosen):
        console.print(line)
    found = Table("of one rank", title="memory")
    found.add_column("even load", justify="right")
    found.add_column("all tokens to one rank", justify="right")
    for name, words in MEMORY.items():
        found.add_row(words, size(getattr(chosen.memory, name)), size(getattr(chosen.worst, name)))
    console.print(found)
    found = Table(title="layouts")
    for column in ("ranks", "ep", "edp", "memory", "worst", "step", "tokens/s", "MFU", "fits"):
        found.add_column(column, justify="right")
    for row, after in zip(table, [*table[1:], None], strict=True):
        layout = row.layout
        found.add_row(
            str(layout.dp), str(layout.ep), str(layout.edp), size(row.memory.total), size(row.worst.total),
            seconds(row.seconds), f"{row.tokens_per_second:,.0f}", f"{row.mfu:.1%}",
            "yes" if row.fits else "NO", end_section=after is None or after.layout.dp != layout.dp,
        )  # fmt: skip
    console.print(found)


def _lines(chosen: Forecast) -> Iterator[str]:
    kinds, held, model = parameters(chosen.config), chosen.memory, chosen.config.model
    yield "parameters  " + ", ".join(f"{value:,} {name}" for name, value in kinds.items())
    flops = flops_per_token(model, chosen.config.train.seq_len)
    yield f"FLOPs       {flops:.4g} a token, {chosen.flops:.4g} a step"
    yield (
        f"wire        a rank sends in a step: dense gradients {size(chosen.dense_bytes)}, expert gradients "
        f"{size(chosen.expert_bytes)},\n            dispatch and combine {size(chosen.exchange_bytes)} forward, "
        f"{size(chosen.exchange_bytes)} backward"
    )
    yield (
        f"step        at best {seconds(chosen.seconds)}: compute {seconds(chosen.compute_seconds)} or memory "
        f"{seconds(chosen.memory_seconds)}, exposed communication {seconds(chosen.exposed_seconds)}"
    )
    yield f"            {chosen.tokens_per_second:,.0f} tokens/s, MFU at most {chosen.mfu:.1%}"
    yield f"KV cache    {size(held.kv_token)} a token, {size(held.kv_token * model.max_seq_len)} a longest sequence"
    if not chosen.fits:
        yield f"DOES NOT FIT: {size(held.total)} of {size(chosen.accelerator.memory)} on a rank"


def size(count: float) -> str:
    """Bytes for a person."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,.0f} B"


def seconds(time: float) -> str:
    """Seconds for a person."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if time >= scale:
            return f"{time / scale:,.3g} {unit}"
    return f"{time / 1e-6:,.3g} µs"
