"""A picture of a scan: what zeros in one layer alone cost, a curve a layer, and which layer suffers most."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..moe.compress.sensitivity import Scan


def draw(found: "Scan", path: Path) -> Path:
    """Write the PNG: on the left increases over shares of zeros, on the right a bar a layer at the highest share."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    layers = list(found.increases)
    colours = [colormaps["viridis"](at / len(layers)) for at in range(len(layers))]
    figure = Figure(figsize=(12, max(4.0, 1.0 + 0.22 * len(layers))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"zeros in one layer, all others dense ({found.dense:.4g})")
    curves, bars = figure.subplots(1, 2)
    for layer, colour in zip(layers, colours, strict=True):
        curves.plot([0.0, *found.shares], [0.0, *found.increases[layer]], color=colour, marker=".", lw=1.2)
    curves.set_yscale("symlog", linthresh=max(0.01 * abs(found.dense), 1e-6))
    curves.xaxis.set_major_formatter(PercentFormatter(1.0))
    curves.set(title="increase (log beyond 1 % of the dense model's)", xlabel="zeros")
    curves.grid(alpha=0.3)
    bars.barh(layers, [found.increases[layer][-1] for layer in layers], color=colours)
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize="small")
    bars.set(title=f"increase at {found.shares[-1]:.0%} zeros")
    figure.savefig(path, dpi=110)
    return path
