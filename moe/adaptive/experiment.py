"""The three objectives on the same vowels from the same start: plain gradient descent on all training cases at once.

T cases, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...configs.typed import check
from .mixture import AdaptiveMixture
from .objectives import OBJECTIVES
from .specialise import Measures, measure
from .task import VOWELS, VowelTask, one_hot, vowel_task

NUM_EXPERTS = 4
EPOCHS = 1500
EVERY = 25  # epochs between two points of a learning curve
LEARNING_RATE = 0.5


@dataclass(frozen=True)
class Run:
    """One trained mixture; `curve` are its measures on the held-out speakers after 0, 25, ... epochs."""

    objective: str
    task: VowelTask
    mixture: AdaptiveMixture
    curve: tuple[Measures, ...]

    @property
    def measures(self) -> Measures:
        """On the held-out speakers, at the end."""
        return self.curve[-1]


def train(objective: str, seed: int, num_experts: int = NUM_EXPERTS, epochs: int = EPOCHS) -> Run:
    """Train one mixture; the seed fixes the task and, alike for every objective, the first weights.

    Args:
        objective: a key of `OBJECTIVES`.
        epochs: steps of gradient descent, each over all 400 training cases.

    Raises:
        ConfigError: no such objective.
    """
    check(objective in OBJECTIVES, "objective", objective, "is not known", f"use one of {', '.join(OBJECTIVES)}")
    task, loss = vowel_task(seed), OBJECTIVES[objective]
    mixture = AdaptiveMixture(num_experts, 2, len(VOWELS), torch.Generator().manual_seed(seed))
    targets_TO, test_targets_TO = one_hot(task.train_y_T), one_hot(task.test_y_T)
    optimizer = torch.optim.SGD(mixture.parameters(), lr=LEARNING_RATE)
    curve = []
    for epoch in range(epochs + 1):
        if epoch % EVERY == 0 or epoch == epochs:
            outputs_TEO, logits_TE = mixture(task.test_x_TD)
            curve.append(measure(outputs_TEO, logits_TE, test_targets_TO))
        if epoch < epochs:
            outputs_TEO, logits_TE = mixture(task.train_x_TD)
            optimizer.zero_grad()
            loss(outputs_TEO, logits_TE, targets_TO).backward()
            optimizer.step()
    return Run(objective, task, mixture, tuple(curve))


def compare(seeds: Sequence[int]) -> dict[str, list[Run]]:
    """Objective → one run a seed."""
    return {objective: [train(objective, seed) for seed in seeds] for objective in OBJECTIVES}


def linear_map(seed: int) -> Measures:
    """The plain answer to beat: one linear map with bias, fitted to the training cases by least squares."""
    task = vowel_task(seed)

    def with_one(x_TD: Tensor) -> Tensor:
        return torch.cat([x_TD, torch.ones(len(x_TD), 1)], 1)

    weight = torch.linalg.lstsq(with_one(task.train_x_TD), one_hot(task.train_y_T)).solution
    answer_T1O = (with_one(task.test_x_TD) @ weight)[:, None]
    return measure(answer_T1O, torch.zeros(len(answer_T1O), 1), one_hot(task.test_y_T))
