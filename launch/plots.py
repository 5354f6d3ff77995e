"""Pictures of a run from its `metrics.jsonl`: a PNG of the loss and of every layer's expert load over time, and a small
rendering of the same for the terminal."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .. import DataError

BARS = "▁▂▃▄▅▆▇█"
SHADES = " ░▒▓█"


def read_rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind (`train`, `eval`).

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
    """Write `plots.png`: loss on top, one map of expert load a MoE layer below, over tokens; returns its path.

    Raises:
        DataError: there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, held_out = read_rows(run, "train"), read_rows(run, "eval")
    if not rows:
        raise DataError(f"{run} has no training rows to draw: train first")
    layers = rows[0]["moe_layers"]
    figure = Figure(figsize=(8, 3 + 1.8 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(layers), 1, sharex=True, squeeze=False)[:, 0]
    steps = [row["step"] for row in rows]
    axes[0].plot(steps, [row["loss"] for row in rows], label="training")
    if held_out:
        axes[0].plot([r["step"] for r in held_out], [r["val_loss"] for r in held_out], "o", label="held out")
    axes[0].set(ylabel="loss (nats a token)", title=run.name)
    axes[0].legend()
    for number, (layer, axis) in enumerate(zip(layers, axes[1:], strict=True)):
        load_ET = [list(expert) for expert in zip(*(row["expert_load"][number] for row in rows), strict=True)]
        even = 1 / len(load_ET)
        edges = [0, *steps]
        image = axis.pcolormesh(edges, range(len(load_ET) + 1), load_ET, vmin=0, vmax=2 * even, cmap="viridis")
        axis.set(ylabel=f"layer {layer}\nexpert")
        figure.colorbar(image, ax=axis, label="share")
    axes[-1].set(xlabel="step")
    path = path or run / "plots.png"
    figure.savefig(path, dpi=120)
    return path


def sketch(run: Path, console: Console, width: int = 60) -> None:
    """Print the loss as a line of bars, and each expert's load as a line of shades (a full block: twice its share)."""
    rows = read_rows(run, "train")
    if not rows:
        return
    losses = resample([row["loss"] for row in rows], width)
    console.print(Text(f"loss {rows[0]['loss']:.3f} → {rows[-1]['loss']:.3f}", style="bold"))
    console.print(Text(bars(losses), style="cyan"))
    for number, layer in enumerate(rows[0]["moe_layers"]):
        console.print(Text(f"expert load, layer {layer} (even share {1 / len(rows[0]['expert_load'][number]):.1%})"))
        for expert, shares in enumerate(zip(*(row["expert_load"][number] for row in rows), strict=True)):
            line = shades(resample(shares, width), 2 / len(rows[0]["expert_load"][number]))
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
