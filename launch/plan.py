"""`turnout plan`: what a run needs on every rank, and how fast it can be, before anything is allocated.

turnout plan experiment=switch_pydocs world=64 train.global_batch=512 accelerator=H100 network=ib400
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import TYPE_CHECKING, Any

from ..configs.hardware import Accelerator, Network, accelerator, network
from ..configs.typed import check
from ..moe import shapes
from ..moe.flops import experts_met, flops_per_token
from ..moe.train.config import RunConfig
from .auto import Choice, Machines, caveats
from .cli import Options, parse, write_json
from .compose import GROUPS, ROOT_KEYS, compose
from .forecast import Forecast
from .layouts import best_first, layouts
from .rank_map import rank_map

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "what a run needs on every rank, and how fast it can be: turnout plan world=64"
HELP = """\
usage: turnout plan [experiment=NAME] [any setting of `turnout train`] [key=value ...]

Arithmetic on the configuration: nothing is allocated, no torch is loaded. Memory of one rank, FLOPs, bytes on the wire,
a bound on speed, which rank does what, and the layouts that the run allows, the best first (parallel=auto takes that
one). docs/planning.md says how it is computed.

  world=null         ranks; null = nproc, or the accelerators of this machine
  accelerator=H100   B200, H200, H100, A100, L40S, cpu, or a .yaml file
  network=ib400      between nodes: nvlink, ib400, ib200, eth100, eth25, eth10, or a .yaml file
  json=PATH          write the plan there

example: turnout plan experiment=switch_pydocs world=8 accelerator=H200 network=ib400
"""
GIB = 2**30
SHOWN = 12  # layouts in the table
WORLDS = tuple(2**i for i in range(13))


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
    machines = Machines(accelerator=chip, network=net, words=f"{options.accelerator}, {options.network}")
    composed = compose(words, options.world, machines=machines)
    config, world = composed.config, composed.world
    chosen = Forecast(config, config.layout(world), chip, net)
    table = best_first(list(layouts(config, world, chip, net)))
    worlds = list(at_other_sizes(config, world, chip, net))
    show(chosen, table, worlds, options, composed.choice)
    plan: dict[str, Any] = {"accelerator": options.accelerator, "network": options.network}
    plan |= {"parameters": parameters(config), "teacher_bytes": teacher_bytes(config)}
    plan |= {"writing_bytes": writing_bytes(chosen)}
    rows = {"layouts": [summary(each) for each in table], "worlds": [summary(each) for each in worlds]}
    write_json(options.json, {**plan, **summary(chosen), **details(chosen), **rows})
    return 0


def at_other_sizes(config: RunConfig, world: int, chip: Accelerator, net: Network) -> Iterator[Forecast]:
    """The run on every power of two of ranks that it divides over, with the ep that is best there."""
    for ranks in sorted({*WORLDS} - {world}):
        found = best_first(list(layouts(config, ranks, chip, net, ("tp", "cp", "pp", "fsdp", "virtual"))))
        yield from found[:1]


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


def teacher_bytes(config: RunConfig) -> int:
    """Weights of the run's teacher in `train.dtype`, on every rank that has the head; 0 without one."""
    if config.train.distill is None:
        return 0
    import torch

    from ..moe.layers.quantized import fixed_names
    from ..moe.models.decoder import Decoder
    from ..moe.models.store import load_config

    with torch.device("meta"):
        teacher = Decoder(load_config(config.train.distill.teacher))
    fixed, each = fixed_names(teacher), 4 if config.train.dtype == "float32" else 2
    return sum(
        part.numel() * (part.itemsize if name in fixed else 4 if shapes.is_router(name) else each)
        for name, part in teacher.state_dict().items()
    )


def writing_bytes(chosen: Forecast) -> int:
    """What a student that writes rows of its own takes while it does, on every rank; 0 where it does not."""
    train = chosen.config.train
    if train.distill is None or not train.distill.on_policy:
        return 0
    from ..inference.write import needed  # loads torch

    rows = min(chosen.memory.rows, ceil(train.distill.written(train.global_batch)))
    return needed(chosen.config.model, rows, train.seq_len)


def summary(forecast: Forecast) -> dict[str, Any]:
    """A row of the table."""
    layout = forecast.layout
    return {
        "world": layout.world, "pp": layout.pp, "dp": layout.dp, "cp": layout.cp, "tp": layout.tp, "ep": layout.ep,
        "edp": layout.edp, "fsdp": forecast.config.parallel.fsdp, "bytes": forecast.memory.total,
        "worst_bytes": forecast.worst.total, "fits": forecast.fits, "seconds": forecast.seconds,
        "tokens_per_second": forecast.tokens_per_second, "mfu": forecast.mfu,
    }  # fmt: skip


def details(forecast: Forecast) -> dict[str, Any]:
    """Where the bytes, the FLOPs and the seconds of the chosen layout are; bytes and seconds of its slowest stage."""
    model, train, slow = forecast.config.model, forecast.config.train, forecast.slowest
    kv = forecast.memory.kv_token
    return {
        "memory": {name: getattr(forecast.memory, name) for name in MEMORY},
        "worst": {name: getattr(forecast.worst, name) for name in MEMORY},
        "stages": [{"stage": s.held.stage, "layers": s.held.layers, "bytes": s.held.total} for s in forecast.stages],
        "kv_cache": {"token": kv, "sequence": kv * model.max_seq_len},
        "flops": {"token": flops_per_token(model, train.seq_len), "step": forecast.flops},
        "wire": {"gradients": slow.gradient_bytes, **{name: getattr(slow, f"{name}_bytes") for name in WIRE}},
        "time": {
            "compute": slow.compute_seconds, "memory": slow.memory_seconds,
            **{name: getattr(slow, f"{name}_seconds") for name in WIRE},
            "sums": forecast.sum_seconds, "bubble": forecast.bubble_seconds, "exposed": forecast.exposed_seconds,
        },
    }  # fmt: skip


MEMORY = {
    "weights": "weights, float32",
    "gradients": "gradients, float32",
    "optimizer": "optimizer state",
    "casts": "weights in train.dtype",
    "activations": "kept for backward",
    "travelling": "received from other stages",
    "logits": "gradients of the loss and the logits",
    "buffers": "all-to-all buffers",
    "workspace": "optimizer's workspace",
    "total": "peak",
}


WIRE = {
    "exchange": "rows to experts and back",
    "tensor": "tokens gathered and summed (tp)",
    "context": "keys and values (cp)",
    "pipeline": "activations and gradients (pp)",
    "gather": "weights (fsdp)",
}


def show(
    chosen: Forecast, table: Sequence[Forecast], worlds: Sequence[Forecast], options: PlanOptions, choice: Choice | None
) -> None:
    """The plan for a person, 100 columns wide."""
    from rich.console import Console
    from rich.table import Table

    console, layout = Console(width=100, highlight=False), chosen.layout
    for line in choice.lines() if choice else caveats(chosen.config):
        console.print(line)
    sizes = " x ".join(f"{name} {getattr(layout, name)}" for name in ("pp", "dp", "cp", "tp"))
    console.print(f"{options.accelerator}, {options.network}: {layout.world} ranks = {sizes}, ep {layout.ep}")
    for line in (*_lines(chosen), *rank_map(layout, chosen.accelerator.node)):
        console.print(line)
    where = f" (stage {chosen.memory.stage} of {layout.pp}, the fullest)" if layout.pp > 1 else ""
    found = Table("of one rank" + where, title="memory")
    found.add_column("even load", justify="right")
    found.add_column("all tokens to one rank", justify="right")
    for name, words in MEMORY.items():
        found.add_row(words, size(getattr(chosen.memory, name)), size(getattr(chosen.worst, name)))
    console.print(found)
    fewer = [row for number, row in enumerate(table) if number < SHOWN or _same(row, chosen)]
    console.print(_table(f"layouts of {layout.world} ranks, the best first", fewer, chosen))
    if len(table) > len(fewer):
        late = sum(not row.fits for row in table) - sum(not row.fits for row in fewer)
        console.print(f"{len(table) - len(fewer)} more layouts are in json=PATH; {late} of them do not fit")
    if worlds:
        console.print(_table("other numbers of ranks", worlds, chosen))


def _table(title: str, rows: Sequence[Forecast], chosen: Forecast) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    found = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("ranks", "pp", "dp", "cp", "tp", "ep", "fsdp", "memory", "worst", "step", "tokens/s", "MFU", "fits"):
        found.add_column(column, justify="right")
    for row in rows:
        layout, mark = row.layout, " *" if _same(row, chosen) else ""
        sizes = (layout.world, layout.pp, layout.dp, layout.cp, layout.tp, layout.ep)
        found.add_row(
            *map(str, sizes), "yes" if row.config.parallel.fsdp else "", size(row.memory.total), size(row.worst.total),
            seconds(row.seconds), f"{row.tokens_per_second:,.0f}", f"{row.mfu:.1%}",
            ("yes" if row.fits else "NO") + mark,
        )  # fmt: skip
    return found


def _same(one: Forecast, other: Forecast) -> bool:
    return one.layout == other.layout and one.config.parallel.fsdp == other.config.parallel.fsdp


def _lines(chosen: Forecast) -> Iterator[str]:
    kinds, held, model, slow = parameters(chosen.config), chosen.memory, chosen.config.model, chosen.slowest
    yield "parameters  " + ", ".join(f"{value:,} {name}" for name, value in kinds.items())
    flops = flops_per_token(model, chosen.config.train.seq_len)
    yield f"FLOPs       {flops:.4g} a token, {chosen.flops:.4g} a step"
    sums = slow.gradient_bytes
    yield (
        f"wire        a rank sends in a step: gradients {size(sum(sums.values()))}, of these its experts' "
        f"{size(sums['edp'])}"
    )
    for name, words in WIRE.items():
        if sent := getattr(slow, f"{name}_bytes"):
            yield f"            {words} {size(sent)}" + ("" if name in ("pipeline", "gather") else " forward")
    yield (
        f"step        at best {seconds(chosen.seconds)}: compute {seconds(slow.compute_seconds)} or memory "
        f"{seconds(slow.memory_seconds)}, exposed communication {seconds(chosen.exposed_seconds)}"
        + (f",\n            pipeline bubble {seconds(chosen.bubble_seconds)}" if chosen.layout.pp > 1 else "")
    )
    yield f"            {chosen.tokens_per_second:,.0f} tokens/s, MFU at most {chosen.mfu:.1%}"
    yield f"KV cache    {size(held.kv_token)} a token, {size(held.kv_token * model.max_seq_len)} a longest sequence"
    if teacher := teacher_bytes(chosen.config):
        yield f"teacher     {size(teacher)} of weights on every rank with the head, beside what follows; its time too"
    if writing := writing_bytes(chosen):
        yield f"writing     {size(writing)} of a step and its cache, free again before a forward pass; its time too"
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
