"""Every layout that a run may have on so many ranks, forecast: what `turnout plan` lists, `parallel=auto` picks from.

The sizes are tried that people use: of tp powers of two within a node, of cp powers of two that leave a rank pieces of
at least 1024 tokens of a row, of pp what divides the ranks, and of ep what divides experts and ranks. What the run
itself refuses is left out.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from .. import ConfigError
from ..configs.hardware import Accelerator, Network
from ..moe.train.config import RunConfig
from .forecast import Forecast

SIZES = ("tp", "cp", "pp", "ep", "fsdp")  # that a layout has beside dp
PIECE = 1024  # tokens of a row below which a rank's piece is too small to be worth the gathers
DEEPEST = 64  # pipelines


def layouts(
    config: RunConfig, world: int, accelerator: Accelerator, network: Network, fixed: Collection[str] = ()
) -> Iterator[Forecast]:
    """The layouts of `world` ranks, in no order.

    Args:
        fixed: keys of `parallel` that keep the values they have.
    """
    tried = {name: values for name, values in _tried(config, world, accelerator.node).items() if name not in fixed}
    keep: dict[str, Any] = {} if "dp" in fixed else {"dp": None}
    for values in product(*tried.values()):
        sizes = dict(zip(tried, values, strict=True))
        whole = {name: getattr(config.parallel, name) for name in SIZES} | sizes
        others = whole["tp"] * whole["cp"] * whole["pp"]
        stage = world // whole["pp"]
        if world % others or config.train.global_batch % (world // others) or stage % whole["ep"]:
            continue
        if whole["fsdp"] and world == 1:
            continue
        if whole["pp"] == 1 and "virtual" not in fixed:
            sizes["virtual"] = 1
        try:
            other = replace(config, parallel=replace(config.parallel, **keep, **sizes))
            layout = other.layout(world)
        except ConfigError:
            continue
        yield Forecast(other, layout, accelerator, network)


def best_first(found: Collection[Forecast]) -> list[Forecast]:
    """Those that fit before those that do not, the fastest first; of equals the simplest."""
    return sorted(found, key=lambda forecast: (not forecast.fits, forecast.seconds, _plainness(forecast)))


def _plainness(forecast: Forecast) -> tuple[int, ...]:
    layout = forecast.layout
    return (layout.tp * layout.cp * layout.pp, int(forecast.config.parallel.fsdp), layout.ep)


def _tried(config: RunConfig, world: int, node: int) -> dict[str, list[Any]]:
    model, length = config.model, config.train.seq_len
    experts = model.moe.num_experts if model.moe else 1
    tp, most = [1], min(node, model.heads, world)
    while tp[-1] * 2 <= most:
        tp.append(tp[-1] * 2)
    cp = [1]
    while cp[-1] * 2 <= min(length // PIECE, world):
        cp.append(cp[-1] * 2)
    return {
        "tp": tp,
        "cp": cp,
        "pp": _divisors(world, min(model.layers, DEEPEST)),
        "ep": _divisors(experts, world),
        "fsdp": [False, True] if world > 1 else [False],
    }


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
