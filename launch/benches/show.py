"""What `turnout bench` prints and draws."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__

if TYPE_CHECKING:
    from .ceilings import Ceilings

DRAWN: Mapping[str, str] = {
    "tokens_per_second": "output tokens / s",
    "kv_utilisation": "filled / reserved slots of the KV cache, mean over time",
    "ttft_p50": "time to first token, p50, s",
    "ttft_p99": "time to first token, p99, s",
    "tpot_p50": "time per output token, p50, s",
    "tpot_p99": "time per output token, p99, s",
    "ttft_alone": "time to first token, one request, s",
    "tpot_alone": "time per output token, one request, s",
    "peak_mb": "peak memory, MB",
    "ready_seconds": "ready after, s",
    "mfu": "share of the measured matrix peak",
}
Rows = Sequence[Mapping[str, Any]]


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "turnout": __version__,
    }


def table(rows: Rows) -> str:
    """The rows in columns, numbers to four digits; `-` where a row has none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([cell(row[name]) if name in row else "-" for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(it.rjust(width) for it, width in zip(line, widths, strict=True)) for line in lines)


def cell(value: object) -> str:
    """A value in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rated(rows: Rows, ceilings: "Ceilings") -> list[dict[str, Any]]:
    """Rows with seconds, bytes and FLOPs, with the rates and the share of the ceiling instead."""
    measured = ("seconds", "size", "flops")
    return [
        {name: value for name, value in row.items() if name not in measured}
        | (ceilings.figures(*(row[name] for name in measured)) if "seconds" in row else {})
        for row in rows
    ]


def draw(what: str, rows: Rows, path: Path, ceilings: "Ceilings | None") -> None:
    """The figures as a PNG."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if "note" not in row]
    figure = Figure(layout="constrained")
    if what == "kernels":
        _shares(figure, shown)
    elif what == "moe" and ceilings is not None:
        _curves(figure, shown, ceilings)
    else:
        _panels(figure, shown)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """A figure as a PNG, folders made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _panels(figure: Any, rows: Rows) -> None:
    """A panel of bars for every figure that people compare; all of them where there are none of those."""
    numbers = [n for n, v in rows[0].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    panels = [name for name in numbers if name in DRAWN] or numbers
    ways = [", ".join(str(value) for name, value in row.items() if name not in numbers) or "model" for row in rows]
    lines = -(-len(panels) // 2)
    figure.set_size_inches(12, lines * (0.7 + 0.32 * len(rows)))
    grid = figure.subplots(lines, 2, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, panels, strict=False):
        values = [row.get(name, 0) for row in rows]
        bars = axes.barh(range(len(ways)), values, color="#31688e")
        axes.set_yticks(range(len(ways)), ways)
        axes.bar_label(bars, labels=[cell(value) for value in values], padding=3)
        axes.set_title(DRAWN.get(name, name.replace("_", " ")), loc="left", fontsize=10)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)


def _shares(figure: Any, rows: Rows) -> None:
    """Every operation and shape: which share of the ceiling each form reaches."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    cases = list(dict.fromkeys((row["op"], row["shape"]) for row in rows))
    figure.set_size_inches(11, 1 + 0.26 * len(cases))
    axes = figure.subplots()
    for form, marker in zip(forms, "osD^v", strict=False):
        own = [row for row in rows if row["form"] == form]
        places = [cases.index((row["op"], row["shape"])) for row in own]
        axes.plot([row["of the ceiling"] for row in own], places, marker, label=form, alpha=0.8)
    axes.set_yticks(range(len(cases)), [f"{op}: {shape}" for op, shape in cases], fontsize=8)
    axes.axvline(1.0, color="grey", ls=":", lw=1)
    axes.set(xlabel="share of what the machine allows", xscale="log", ylim=(len(cases) - 0.5, -0.5))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower left")


def _curves(figure: Any, rows: Rows, ceilings: "Ceilings") -> None:
    """Rates over the number of tokens, a line a form, under the machine's ceilings."""
    figure.set_size_inches(12, 4.5)
    limits = asdict(ceilings)
    for axes, name, limit in zip(figure.subplots(1, 2), ("GB/s", "GFLOP/s"), ("read", "bfloat16"), strict=True):
        for form in dict.fromkeys(row["form"] for row in rows):
            own = [row for row in rows if row["form"] == form]
            axes.plot([row["tokens"] for row in own], [row[name] for row in own], "o-", label=form)
        axes.axhline(limits[limit] / 1e9, color="grey", ls=":", label=f"measured: {limit}")
        axes.set(xscale="log", xlabel="tokens", title=name, ylim=(0, None))
    axes.legend(fontsize="small")
