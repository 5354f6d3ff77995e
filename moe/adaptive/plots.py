"""The comparison as a picture: who answers where in the plane of formants, how it was learned, and what is left when
only the chosen expert answers.

E experts, D = 2 formants, T points of the plane or held-out cases.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .experiment import EVERY, Run
from .specialise import Measures
from .task import VOWELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colours, told apart by colour-blind readers too.
EXPERT_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
OBJECTIVE_STYLES = {"cooperative": ("#D55E00", "-"), "competitive": ("#0072B2", "--"), "log-likelihood": ("black", ":")}
MARKERS = "o^sD"
GRID = 300
DEEPEST = 0.8  # of a colour, so that black marks stand out


def picture(runs: dict[str, list[Run]], linear: Sequence[Measures], path: Path) -> Path:
    """Write a PNG and return its path.

    Args:
        runs: objective → one run a seed, of at most 4 experts; the maps on top are of the first seed.
        linear: the single linear map of each seed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    (maps, lower) = figure.subplots(2, 3, height_ratios=(1.25, 1))
    for axis, (objective, of_seeds) in zip(maps, runs.items(), strict=True):
        _draw_map(axis, objective, of_seeds[0])
    _draw_curves(lower[0], runs)
    _draw_accuracies(lower[1], runs, linear)
    _draw_sharing(lower[2], runs)
    maps[0].legend(loc="upper right", fontsize=8)
    seeds = len(next(iter(runs.values())))
    figure.suptitle(
        "Top: the expert that the gate prefers (a colour each, paler where it shares), for the first seed.  "
        f"Bottom: held-out speakers, median of {seeds} seeds.",
        fontsize=11,
    )
    figure.savefig(path, dpi=95)
    return path


def _draw_map(axis: "Axes", objective: str, run: Run) -> None:
    """Colour: the chosen expert, paler where others share; lines: what it answers alone; marks: the held-out vowels."""
    task, measures = run.task, run.measures
    low_D, high_D = (edge(task.test_x_TD) for edge in (lambda x: x.amin(0) - 0.3, lambda x: x.amax(0) + 0.3))
    first, second = (torch.linspace(float(a), float(b), GRID) for a, b in zip(low_D, high_D, strict=True))
    plane_TD = torch.cartesian_prod(first, second)
    chosen_T, share_T, answer_T = (part.view(GRID, GRID).T.numpy() for part in _choose(run, plane_TD))
    f1, f2 = ((values * task.scale_D[i] + task.center_D[i]).numpy() for i, values in enumerate((first, second)))
    axis.imshow(
        _paint(run, chosen_T, share_T),
        extent=(f1[0], f1[-1], f2[0], f2[-1]),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    for vowel in range(len(VOWELS)):
        axis.contour(f1, f2, answer_T == vowel, levels=[0.5], colors="black", linewidths=1)
    wrong_T = _choose(run, task.test_x_TD)[2] != task.test_y_T
    hz_TD = task.test_x_TD * task.scale_D + task.center_D
    for vowel, (name, marker) in enumerate(zip(VOWELS, MARKERS, strict=True)):
        for missed, face in ((False, "white"), (True, "black")):
            x, y = hz_TD[(task.test_y_T == vowel) & (wrong_T == missed)].T.numpy()
            axis.scatter(x, y, 18, marker=marker, c=face, edgecolors="black", linewidths=0.6)
        axis.scatter([], [], 30, marker=marker, c="white", edgecolors="black", label=f"[{name}]")
    axis.scatter([], [], 30, marker="o", c="black", label="chosen expert alone is wrong")
    axis.plot([], [], color="black", linewidth=1, label="its answer changes here")
    axis.set(xlabel="F1 (Hz)", ylabel="F2 (Hz)")
    axis.set_title(objective, fontsize=13, fontweight="bold", pad=22)
    scores = f"all experts {measures.blend_accuracy:.0%} right, the chosen one alone {measures.alone_accuracy:.0%}"
    axis.text(0.5, 1.02, scores, ha="center", transform=axis.transAxes)


@torch.no_grad()
def _choose(run: Run, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chosen expert, its gate probability, and the vowel that it answers alone."""
    outputs_TEO, logits_TE = run.mixture(x_TD)
    share_T, chosen_T = logits_TE.softmax(-1).max(-1)
    return chosen_T, share_T, outputs_TEO[torch.arange(len(x_TD)), chosen_T].argmax(-1)


def _paint(run: Run, chosen: np.ndarray, share: np.ndarray) -> np.ndarray:
    """RGB: the chosen expert's colour where it answers alone, fading to white where it has no more than 1/E."""
    num_experts = run.mixture.gate_ED.shape[0]
    used = list(dict.fromkeys(chosen.T.ravel().tolist()))  # by rising F1, so that like domains get like colours
    order = np.argsort(used + [e for e in range(num_experts) if e not in used])
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in EXPERT_COLOURS])
    strength = DEEPEST * ((share - 1 / num_experts) / (1 - 1 / num_experts))[..., None]
    return 1 - strength * (1 - rgb[order[chosen]])


def _draw_curves(axis: "Axes", runs: dict[str, list[Run]]) -> None:
    for objective, of_seeds in runs.items():
        colour, line = OBJECTIVE_STYLES[objective]
        alone = np.array([[point.alone_error for point in run.curve] for run in of_seeds])
        epochs = EVERY * np.arange(alone.shape[1])
        axis.plot(epochs, np.median(alone, 0), line, color=colour, linewidth=2, label=objective)
        axis.fill_between(epochs, alone.min(0), alone.max(0), color=colour, alpha=0.12, linewidth=0)
    axis.set(xlabel="epoch", ylabel="mean squared distance", ylim=(0, None))
    axis.set_title("Error of the chosen expert alone\n(band: all seeds)")
    axis.legend()


def _draw_accuracies(axis: "Axes", runs: dict[str, list[Run]], linear: Sequence[Measures]) -> None:
    _draw_bars(axis, runs, lambda m: m.blend_accuracy, -0.2, "#BBBBBB", "all experts, blended")
    _draw_bars(axis, runs, lambda m: m.alone_accuracy, 0.2, "#0072B2", "the chosen expert alone")
    level = float(np.median([m.blend_accuracy for m in linear]))
    axis.axhline(level, color="black", linestyle=":", label="one linear map for everything")
    axis.set(ylim=(0, 1.35), ylabel="share right")
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.set_title("Vowels recognised\n(dots: seeds)")
    axis.legend(loc="upper center", fontsize=8)


def _draw_sharing(axis: "Axes", runs: dict[str, list[Run]]) -> None:
    _draw_bars(axis, runs, lambda m: m.experts_a_case, 0, "#009E73", None)
    axis.axhline(1, color="black", linestyle=":")
    axis.set(ylim=(0, 2.5), ylabel="mean exp(entropy of the gate)")
    axis.set_title("Experts that share a case\n(1: one expert answers; dots: seeds)")


def _draw_bars(
    axis: "Axes",
    runs: dict[str, list[Run]],
    value: Callable[[Measures], float],
    shift: float,
    colour: str,
    label: str | None,
) -> None:
    """One bar an objective at the median, one dot a seed."""
    values = np.array([[value(run.measures) for run in of_seeds] for of_seeds in runs.values()])
    place = np.arange(len(runs)) + shift
    axis.bar(place, np.median(values, 1), 0.38, color=colour, label=label)
    jitter = np.linspace(-0.12, 0.12, values.shape[1])
    axis.scatter(place[:, None] + jitter, values, 9, c="white", edgecolors="black", linewidths=0.6, zorder=3)
    axis.set_xticks(range(len(runs)), list(runs))
    axis.set_xlim(-0.6, len(runs) - 0.4)
