"""A picture of a compressed model: what it saves, what it costs, and how far its routers still agree."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER = "#9aa5b1", "#0f766e"


def draw(report: Mapping[str, Any], path: Path) -> Path:
    """Write the PNG: size, perplexity and speed before and after; below, by block, the share of equal choices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [("size, MB", report["bytes_before"] / 1e6, report["bytes_after"] / 1e6)]
    pairs.append(("perplexity", report["perplexity_before"], report["perplexity_after"]))
    if "tokens_per_second_before" in report:
        pairs.append(("tokens/s, one request", report["tokens_per_second_before"], report["tokens_per_second_after"]))
    shares = {i: notes["agreement"] for i, notes in enumerate(report["layers"]) if "agreement" in notes}
    figure = Figure(figsize=(3.2 * len(pairs), 6.0 if shares else 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{report['method']}: {report['smaller']:.2f} x smaller, {report['bits_per_weight']:.2f} bits a weight"
    )
    grid = figure.add_gridspec(2 if shares else 1, len(pairs))
    for column, (name, before, after) in enumerate(pairs):
        _bars(figure.add_subplot(grid[0, column]), name, before, after)
    if shares:
        axes = figure.add_subplot(grid[1, :])
        axes.plot([str(block) for block in shares], list(shares.values()), color=AFTER, marker="o")
        axes.set_ylim(min(0.9, *shares.values()), 1.0)
        axes.set_xlabel("block")
        axes.set_title("choices of experts that are the same", fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def _bars(axes: "Axes", name: str, before: float, after: float) -> None:
    heights = [value if isfinite(value) else 0.0 for value in (before, after)]
    bars = axes.bar(["before", "after"], heights, color=[BEFORE, AFTER], width=0.6)
    axes.bar_label(bars, labels=[f"{value:,.4g}" for value in (before, after)], padding=2)
    axes.set_title(name, fontsize=10)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
