"""Pictures of a run from its `metrics.jsonl`: a PNG of the loss, of how the routers fare and of every layer's experts
over time, and a small rendering of the same for the terminal."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from .. import DataError

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

BARS = "▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"
COLUMNS = 400  # moments that a map shows at most; beyond, means over equal stretches
HOT = 3.0  # times its even share at which an expert's colour is full
ALARM = "magenta"
SCREEN = 64  # lines of the terminal's rendering at most
PANELS = {
    "router_entropy": "router entropy (nats; dotted: undecided)",
    "load_max_mean": "busiest expert's load / mean (dotted: even)",
    "layer_drop_fraction": "dropped assignments",
}
Rows = Sequence[dict[str, Any]]


def read_rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind (`train`, `eval`, `alarm`).

    Raises:
        DataError: the run has no metrics, or a row does not read.
    """
    path = run / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} does not read as one JSON object a line ({error}): train first") from error
    return [row for row in rows if row["kind"] == kind]


def picture(run: Path, path: Path | None = None) -> Path:
    """Write `plots.png` and return its path.

    On top loss, router entropy, busiest expert and drops over steps, a line a MoE layer; below a heat map of the
    experts a layer. Alarms are marked in red.

    Raises:
        DataError: there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(run, "train")
    if not rows:
        raise DataError(f"{run} has no training rows to draw: train first")
    alarms, layers = read_rows(run, "alarm"), rows[0]["moe_layers"]
    across = 1 if len(layers) <= 2 else 2 if len(layers) <= 8 else 3
    down = -(-len(layers) // across)
    experts = max((len(load) for load in rows[0]["expert_load"]), default=0)
    heights = [5.8, 0.8 + down * (1.6 + 0.017 * min(experts, 64))] if layers else [3.6]  # inches
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    parts[0].suptitle(run.name)
    _curves(parts[0], rows, read_rows(run, "eval"), alarms)
    if layers:
        _maps(parts[1], parts[1].subplots(down, across, squeeze=False), rows, alarms)
    path = path or run / "plots.png"
    figure.savefig(path, dpi=110)
    return path


def _curves(figure: "SubFigure", rows: Rows, held_out: Rows, alarms: Rows) -> None:
    """Loss; and where there are experts, how the routers fare, a line a layer."""
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    steps, layers = [row["step"] for row in rows], rows[0]["moe_layers"]
    axes = figure.subplots(2, 2, sharex=True).flatten() if layers else [figure.subplots()]
    axes[0].plot(steps, [row["loss"] for row in rows], color="black", label="training")
    if held_out:
        axes[0].plot([r["step"] for r in held_out], [r["val_loss"] for r in held_out], "o", label="held out")
    axes[0].set(title="loss (nats a token)")
    axes[0].legend()
    lines = []
    for axis, (name, title) in zip(axes[1:], PANELS.items(), strict=False):
        axis.set(title=title)
        for at, layer in enumerate(layers):
            colour = colormaps["viridis"](at / len(layers))
            lines += axis.plot(steps, [row[name][at] for row in rows], color=colour, lw=1.2, label=f"layer {layer}")
        marks = [axis.axvline(alarm["step"], color=ALARM, ls="--", lw=1, label="collapse") for alarm in alarms]
    if layers:
        undecided = math.log(len(rows[0]["expert_load"][0]))
        for axis, value in ((axes[1], undecided), (axes[2], 1.0)):
            axis.axhline(value, color="grey", ls=":", lw=1)
        axes[3].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[3].set_ylim(bottom=0)
        figure.legend(
            handles=[*lines[: len(layers)], *marks[:1]], loc="outside lower center", ncols=7, fontsize="small"
        )
    for axis in axes[-2:]:
        axis.set(xlabel="step")


def _maps(figure: "SubFigure", axes: Any, rows: Rows, alarms: Rows) -> None:
    """Each layer's experts over steps: white is an even share, black no token at all."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    layers, experts = rows[0]["moe_layers"], len(rows[0]["expert_load"][0])
    starts = [len(rows) * i // COLUMNS for i in range(COLUMNS)] if len(rows) > COLUMNS else range(len(rows))
    edges = [0, *(rows[end - 1]["step"] for end in [*starts[1:], len(rows)])]
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(min(HOT, experts), 1.5))
    colours = colormaps["coolwarm"].with_extremes(bad="black")
    for at, axis in enumerate(axes.flat):
        axis.set_visible(at < len(layers))
    for at, (layer, axis) in enumerate(zip(layers, axes.flat, strict=False)):
        load_RE = np.array([row["expert_load"][at] for row in rows]) * experts
        load_CE = np.add.reduceat(load_RE, starts) / np.diff([*starts, len(rows)])[:, None]
        shown_EC = np.ma.masked_equal(load_CE.T, 0.0)
        image = axis.pcolormesh(edges, np.arange(experts + 1) - 0.5, shown_EC, norm=norm, cmap=colours)
        fired = [alarm["step"] for alarm in alarms if alarm["layer"] == layer]
        for step in fired:
            axis.axvline(step, color=ALARM, ls="--", lw=1.2)
        title = f"layer {layer}" + (f": collapsed at step {', '.join(map(str, fired))}" if fired else "")
        axis.set_title(title, fontsize="medium", color=ALARM if fired else "black")
        axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    for axis in axes[:, 0]:
        axis.set(ylabel="expert")
    for axis in axes[-1]:
        axis.set(xlabel="step")
    figure.colorbar(
        image, ax=axes, label="load / even share (black: dead)", extend="max", location="bottom", aspect=50, shrink=0.5
    )


def sketch(run: Path, console: Console, width: int = 60) -> None:
    """Print the loss as a line of bars, and each expert's load as a line of shades (a full block: twice its share).

    Where that would be more than a screen, a line of bars a layer instead: its busiest expert's load.
    """
    rows = read_rows(run, "train")
    if not rows:
        return
    console.print(Text(f"loss {rows[0]['loss']:.3f} → {rows[-1]['loss']:.3f}", style="bold"))
    console.print(Text(bars(resample([row["loss"] for row in rows], width)), style="cyan"))
    layers, experts = rows[0]["moe_layers"], max((len(load) for load in rows[0]["expert_load"]), default=0)
    if len(layers) * experts > SCREEN:
        console.print(Text("busiest expert's load / mean, by layer (1 is even)"))
        for at, layer in enumerate(layers):
            peaks = [row["load_max_mean"][at] for row in rows]
            console.print(Text(f"{layer:>3} {bars(resample(peaks, width))} {peaks[-1]:6.2f}"))
        return
    for at, layer in enumerate(layers):
        console.print(Text(f"expert load, layer {layer} (even share {1 / experts:.1%})"))
        for expert, shares in enumerate(zip(*(row["expert_load"][at] for row in rows), strict=True)):
            line = shades(resample(shares, width), 2 / experts)
            console.print(Text(f"{expert:>3} {line} {shares[-1]:6.1%}"))


def bars(values: Sequence[float]) -> str:
    """One bar a value, between the smallest and the largest."""
    low, high = min(values), max(values)
    return "".join(BARS[_level((v - low) / (high - low) if high > low else 0.5, len(BARS))] for v in values)


def shades(values: Sequence[float], full: float) -> str:
    """One shade a value, a full block at `full` and above."""
    return "".join(SHADES[_level(value / full, len(SHADES))] for value in values)


def resample(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means over equal stretches of `values`."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _level(share: float, levels: int) -> int:
    return min(max(int(share * levels), 0), levels - 1)
