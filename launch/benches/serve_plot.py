"""A picture of servers under load: how long tokens took, how many came, how many requests met the objective."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import figures, show
from .online import Answer
from .serve import Turn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#31688e", "#d1495b", "#2a9d6e", "#e09f3e", "#7b4fa3", "#5b5b5b")  # apart for most eyes, by lightness too
BINS = 60  # of the time of a run


def draw(path: Path, done: Sequence[Turn], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the `picture` as a PNG."""
    show.save(picture(done, rows), path)


def picture(done: Sequence[Turn], rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Distributions of TTFT and TPOT, tokens and requests over the first round's time, goodput against the rate.

    Args:
        done: all turns.
        rows: a row for each server and load.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(2, 2)
    servers = list(dict.fromkeys(turn.server for turn in done))
    loads = list(dict.fromkeys(_label(turn.load.label) for turn in done))
    for turn in (turn for turn in done if turn.round == 0):
        label = _label(turn.load.label)
        answers = [a for t in done if t.server == turn.server and t.load is turn.load for a in t.answers if a.ok]
        look = {
            "color": COLOURS[servers.index(turn.server) % len(COLOURS)],
            "alpha": (loads.index(label) + 1) / len(loads),
            "label": ", ".join(filter(None, (turn.server, label))),
        }
        for axes, name in zip(grid[0], ("ttft", "tpot"), strict=True):
            _distribution(axes, figures.times(answers)[name], look)
        if label == loads[-1]:
            edges, values = rates(turn.answers)
            grid[1][0].stairs(values, edges, **look)
        if len(loads) == 1:
            _running(grid[1][1], turn.answers, look)
    if len(loads) > 1:
        _sweep(grid[1][1], servers, rows)
    for axes, title, unit in (
        (grid[0][0], "time to first token, from when it was due", "seconds"),
        (grid[0][1], "time per output token", "seconds"),
        (grid[1][0], ", ".join(filter(None, ("output tokens a second, first round", loads[-1]))), "seconds"),
    ):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(unit)
    for axes in grid[1]:
        axes.set_ylim(bottom=0)  # when all is drawn: a limit ends the scaling
    for axes in grid.flatten():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False, fontsize=9)
    return figure


def rates(answers: Sequence[Answer]) -> tuple[Any, Any]:
    """Edges of equal times (s), and the tokens a second that came between them.

    A piece stands for as many tokens as the pieces of its answer do on average; an answer without times for all of
    its tokens, at its end.
    """
    good = [answer for answer in answers if answer.ok]
    at = np.array([time for a in good for time in (a.times or (a.end,))])
    weights = np.array([a.tokens / max(len(a.times), 1) for a in good for _ in (a.times or (a.end,))])
    edges = np.linspace(0.0, max(answer.end for answer in answers), BINS + 1)
    counts, _ = np.histogram(at, edges, weights=weights)
    return edges, counts / np.diff(edges)


def _distribution(axes: Any, values: Sequence[float], look: Mapping[str, Any]) -> None:
    """The share of requests that took at most so long, with marks at 50, 90 and 99 %."""
    ordered = np.sort(values)
    axes.step(ordered, np.arange(1, len(ordered) + 1) / max(len(ordered), 1), where="post", **look)
    if not values:
        return
    marks = [figures.percentile(values, share) for share in figures.SHARES.values()]
    axes.plot(marks, list(figures.SHARES.values()), "o", ms=4, color=look["color"], alpha=look["alpha"])
    axes.set(ylim=(0, 1.02), ylabel="share of requests")
    if ordered[0] > 0 and ordered[-1] > 20 * ordered[0]:
        axes.set_xscale("log")


def _running(axes: Any, answers: Sequence[Answer], look: Mapping[str, Any]) -> None:
    """Requests that were due and had not ended."""
    changes = sorted([(answer.due, 1) for answer in answers] + [(answer.end, -1) for answer in answers])
    axes.step([at for at, _ in changes], np.cumsum([by for _, by in changes]), where="post", **look)
    axes.set_title("requests that were due and had not ended, first round", loc="left", fontsize=10)
    axes.set_xlabel("seconds")


def _sweep(axes: Any, servers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Requests a second that met the objective (or were answered) against those that were sent."""
    about = "rate" if "rate" in rows[0] else "concurrency"
    name = "goodput" if "goodput" in rows[0] else "requests_per_second"
    for server, colour in zip(servers, np.resize(COLOURS, len(servers)), strict=True):
        own = [row for row in rows if row["server"] == server]
        axes.plot([row[about] for row in own], [row[name] for row in own], "o-", color=colour, label=server)
    if about == "rate":
        most = max(row["rate"] for row in rows)
        axes.plot([0, most], [0, most], ":", color="grey", lw=1)
    said = "met the objective" if name == "goodput" else "were answered"
    axes.set_title(f"requests a second that {said}", loc="left", fontsize=10)
    axes.set(xlabel={"rate": "requests a second that were due"}.get(about, about), xlim=(0, None))


def _label(label: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in label.items())
