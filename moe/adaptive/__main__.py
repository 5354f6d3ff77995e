"""`python -m turnout.moe.adaptive [PNG]` trains the three objectives with 11 seeds each and prints what came out."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .experiment import EPOCHS, NUM_EXPERTS, compare, linear_map
from .plots import picture
from .specialise import Measures

SEEDS = range(11)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison on one core (about 20 s); write the picture where a path is given."""
    parser = argparse.ArgumentParser(prog="python -m turnout.moe.adaptive", description=__doc__)
    parser.add_argument("png", nargs="?", type=Path, help="where to write the picture")
    png = parser.parse_args(arguments).png
    if png is not None and (png.suffix != ".png" or not png.parent.is_dir()):
        parser.error(f"png ({png}) must end in .png and lie in a folder that exists: give another path")
    torch.set_num_threads(1)
    runs = compare(SEEDS)
    linear = [linear_map(seed) for seed in SEEDS]
    rows = {name: [run.measures for run in of_seeds] for name, of_seeds in runs.items()}
    console = Console()
    console.print(table(rows | {"one linear map": linear}))
    if png is not None:
        console.print(f"picture: {picture(runs, linear, png)}")


def table(rows: dict[str, list[Measures]]) -> Table:
    """The median over seeds and, below it, smallest to largest; it fits 80 columns."""
    columns = {
        "right\nall, %": ("blend_accuracy", 100, ".0f"),
        "right\nalone": ("alone_accuracy", 100, ".0f"),
        "error\nall": ("blend_error", 1, ".2f"),
        "error\nalone": ("alone_error", 1, ".2f"),
        "experts\na case": ("experts_a_case", 1, ".2f"),
        "used": ("experts_used", 1, ".0f"),
        "bits": ("information", 1, ".1f"),
    }
    seeds = len(next(iter(rows.values())))
    title = f"held-out speakers, {NUM_EXPERTS} experts, {EPOCHS} epochs: median and range of {seeds} seeds"
    result = Table(title=title, box=box.SIMPLE, padding=0)
    result.add_column("objective", no_wrap=True)
    for name in columns:
        result.add_column(name, justify="right", no_wrap=True)
    for objective, measures in rows.items():
        cells = []
        for field, unit, form in columns.values():
            values = [unit * getattr(m, field) for m in measures]
            middle, low, high = (format(v, form) for v in (statistics.median(values), min(values), max(values)))
            cells.append(f"{middle}\n{low}–{high}")
        result.add_row(objective, *cells)
    return result


if __name__ == "__main__":
    main()
