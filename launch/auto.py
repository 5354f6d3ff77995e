"""`parallel=auto`: the layout with the shortest predicted step of those that fit, chosen before any rank starts.

turnout train experiment=switch_pydocs parallel=auto nproc=8
turnout plan parallel=auto world=64 parallel.tp=2 accelerator=H100

The formulas are those of `turnout plan`. Keys of `parallel` that the command line gives stay as given. Where no layout
fits, `train.recompute` and then `train.micro_batch` follow, unless they are given too: neither changes the results.
What was chosen is frozen into the run's `config.yaml`; ranks never choose.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import ConfigError
from ..configs.hardware import ACCELERATORS, NETWORKS, Accelerator, Network
from ..moe.train.config import RunConfig
from .forecast import Forecast
from .layouts import best_first, layouts

UNKNOWN = "H100"  # what a GPU that no table knows is taken for
NETWORK = "ib400"  # what nobody said anything about
# What is tried in turn when nothing fits: memory for time.
RELIEFS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": "selective"},
    {"recompute": "full"},
    {"recompute": "full", "micro_batch": 1},
)
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What a run is planned for, and in words where that comes from."""

    accelerator: Accelerator
    network: Network
    words: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was picked, first, and what else fits, best first; `tried` layouts in all."""

    picked: tuple[Forecast, ...]
    tried: int
    machines: Machines

    @property
    def config(self) -> RunConfig:
        """The run with the sizes that were picked, every one of them said."""
        first = self.picked[0]
        return replace(first.config, parallel=replace(first.config.parallel, dp=first.layout.dp))

    def lines(self) -> Iterator[str]:
        """For a person: the pick, why, and the next best."""
        train = self.picked[0].config.train
        yield f"parallel=auto for {self.machines.words}"
        yield (
            f"{self.tried} layouts, {len(self.picked)} fit, the fastest is taken"
            f" (train.recompute={train.recompute}, train.micro_batch={train.micro_batch or 'null'}):"
        )
        yield from caveats(self.picked[0].config)
        yield f"{'dp':>6}{'cp':>5}{'tp':>5}{'pp':>5}{'ep':>5}  fsdp {'memory':>12} {'step':>10}"
        for forecast in self.picked[:SHOWN]:
            sizes, on = forecast.layout, "yes" if forecast.config.parallel.fsdp else "no"
            yield (
                f"{sizes.dp:>6}{sizes.cp:>5}{sizes.tp:>5}{sizes.pp:>5}{sizes.ep:>5}  {on:>4} "
                f"{forecast.memory.total / 2**30:>8.2f} GiB {forecast.seconds:>8.3g} s"
            )


def caveats(config: RunConfig) -> Iterator[str]:
    """What of the run is in no number, for a person."""
    if config.train.compile:
        yield "train.compile is on: memory and time are those of blocks that are not compiled"


def choose(config: RunConfig, world: int, machines: Machines, given: Collection[str]) -> Choice:
    """The layouts of `world` ranks that fit, best first.

    Args:
        given: keys that the command line sets, dotted: they stay.

    Raises:
        ConfigError: the run allows no layout, or none fits.
    """
    fixed = [key.removeprefix("parallel.") for key in given if key.startswith("parallel.")]
    found: list[Forecast] = []
    for relief in RELIEFS:
        if any(f"train.{key}" in given for key in relief):
            continue
        other = replace(config, train=replace(config.train, **relief))
        found = list(layouts(other, world, machines.accelerator, machines.network, fixed))
        picked = tuple(forecast for forecast in best_first(found) if forecast.fits)
        if picked:
            return Choice(picked=picked, tried=len(found), machines=machines)
    if not found:
        config.layout(world)
        raise ConfigError(f"parallel (auto) finds no layout of {world} ranks: change train.global_batch or the ranks")
    least = min(found, key=lambda forecast: forecast.memory.total)
    raise ConfigError(
        f"parallel (auto) finds no layout of {world} ranks that fits: the smallest takes "
        f"{least.memory.total / 2**30:.1f} of {machines.accelerator.memory / 2**30:.1f} GiB on {machines.words}: "
        "use more ranks, a smaller train.micro_batch or a smaller model"
    )


def detect(world: int, models: Sequence[str]) -> Machines:
    """This machine, without torch: its GPUs' data sheet by their name, or its memory shared by the ranks.

    Args:
        models: the names of its GPUs, as the driver has them.
    """
    network = NETWORKS[NETWORK]
    if not models:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world
        chip = replace(ACCELERATORS["cpu"], memory=memory, node=world)
        return Machines(accelerator=chip, network=network, words=f"{world} ranks of this machine's processors")
    known = next((name for name in ACCELERATORS if name in models[0]), None)
    chip, size = ACCELERATORS[known or UNKNOWN], re.search(r"(\d+) ?GB", models[0])
    memory = min(chip.memory, float(size[1]) * 1e9) if size else chip.memory
    chip = replace(chip, memory=memory, node=len(models))
    words = f"{models[0]} ({f'taken for {UNKNOWN}' if known is None else known}), {len(models)} a node"
    return Machines(accelerator=chip, network=network, words=words + (f", {NETWORK}" if world > len(models) else ""))


def gpus(root: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The names of this machine's NVIDIA GPUs."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob("*/information"))]
    return [found[1].strip() for text in texts if (found := re.search(r"Model:(.*)", text))]
