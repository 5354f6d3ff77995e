"""How far a mixture has divided the work: is the expert that the gate prefers enough alone?

T cases, E experts, O outputs (one a class).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .objectives import blend

USED = 0.02  # an expert counts as used when it is chosen for more than this share of the cases


@dataclass(frozen=True)
class Measures:
    """What `measure` finds; "alone" means the answer of the expert with the largest gate probability, by itself.

    Attributes:
        blend_error, alone_error: mean squared distance from the target.
        blend_accuracy, alone_accuracy: share of cases whose largest output is the class.
        largest_gate: mean of max_i p_i: 1/E to 1.
        experts_a_case: mean of exp(entropy of p): 1 when one expert answers, E when all do alike.
        experts_used: experts chosen for more than 2 % of the cases.
        information: mutual information of chosen expert and class, in bits.
    """

    blend_error: float
    alone_error: float
    blend_accuracy: float
    alone_accuracy: float
    largest_gate: float
    experts_a_case: float
    experts_used: int
    information: float


@torch.no_grad()
def measure(outputs_TEO: Tensor, logits_TE: Tensor, targets_TO: Tensor) -> Measures:
    """The measures of a mixture on cases whose targets are one-hot."""
    y_T, chosen_T = targets_TO.argmax(-1), logits_TE.argmax(-1)
    blend_TO = blend(outputs_TEO, logits_TE)
    alone_TO = outputs_TEO[torch.arange(len(chosen_T)), chosen_T]
    gate_TE = logits_TE.softmax(-1)
    entropy_T = torch.special.entr(gate_TE).sum(-1)
    joint_EO = torch.zeros(logits_TE.shape[1], targets_TO.shape[1]).index_put(
        (chosen_T, y_T), torch.tensor(1 / len(y_T)), accumulate=True
    )
    return Measures(
        blend_error=_error(blend_TO, targets_TO),
        alone_error=_error(alone_TO, targets_TO),
        blend_accuracy=_accuracy(blend_TO, y_T),
        alone_accuracy=_accuracy(alone_TO, y_T),
        largest_gate=gate_TE.amax(-1).mean().item(),
        experts_a_case=entropy_T.exp().mean().item(),
        experts_used=int((joint_EO.sum(1) > USED).sum()),
        information=_mutual_information(joint_EO),
    )


def _error(answer_TO: Tensor, targets_TO: Tensor) -> float:
    return (targets_TO - answer_TO).square().sum(-1).mean().item()


def _accuracy(answer_TO: Tensor, y_T: Tensor) -> float:
    return (answer_TO.argmax(-1) == y_T).float().mean().item()


def _mutual_information(joint_EO: Tensor) -> float:
    """H(expert) + H(class) − H(expert, class), in bits."""
    expert, both, label = (torch.special.entr(p).sum() for p in (joint_EO.sum(1), joint_EO, joint_EO.sum(0)))
    return max((expert + label - both).item(), 0.0) / math.log(2)
