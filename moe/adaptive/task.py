"""Four vowels as clouds of their first two formants, generated: the task of the 1991 paper without its recordings.

Jacobs et al. told [i], [ɪ], [ɑ] and [ʌ] apart (heed, hid, hod, hud) in the measurements of Peterson & Barney 1952
(JASA 24:175-184). Here the measurements are drawn anew from that paper's published averages (table II) for its 33 men,
28 women and 15 children, who say every vowel twice:

    log F = log average(vowel, kind of speaker) + speaker + speaker's vowel + repetition

The three deviations are normal and independent, for F1 and F2 alike; their sizes (`SPREAD`) were fitted once to the
1952 measurements of these vowels. Formants are correlated in speech and independent here. 50 speakers are for
training, the other 26 are held out.

T cases, D = 2 formants, O = 4 vowels, S speakers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VOWELS = ("i", "ɪ", "ɑ", "ʌ")
SPEAKERS = (33, 28, 15)  # men, women, children
TRAINING_SPEAKERS = 50
REPETITIONS = 2

# (F1, F2) in Hz of men, women and children, a row a vowel: Peterson & Barney 1952, table II.
AVERAGE_HZ = (
    ((270, 2290), (310, 2790), (370, 3200)),
    ((390, 1990), (430, 2480), (530, 2730)),
    ((730, 1090), (850, 1220), (1030, 1370)),
    ((640, 1190), (760, 1400), (850, 1590)),
)
# Standard deviations of log F1 and log F2: between speakers, of a speaker's vowel, between repetitions.
SPREAD = ((0.075, 0.052), (0.093, 0.057), (0.070, 0.037))


@dataclass(frozen=True)
class VowelTask:
    """Formants scaled to mean 0 and deviation 1 over the training cases, and vowels 0 to 3.

    Attributes:
        train_x_TD, test_x_TD: scaled (F1, F2); Hz = x · scale + center.
        train_y_T, test_y_T: the index in `VOWELS`.
        center_D, scale_D: Hz.
    """

    train_x_TD: Tensor
    train_y_T: Tensor
    test_x_TD: Tensor
    test_y_T: Tensor
    center_D: Tensor
    scale_D: Tensor


def vowel_task(seed: int) -> VowelTask:
    """The same task for the same seed: 400 training cases and 208 held-out ones, of other speakers."""
    generator = torch.Generator().manual_seed(seed)
    kind_S = torch.arange(3).repeat_interleave(torch.tensor(SPEAKERS))
    kind_S = kind_S[torch.randperm(len(kind_S), generator=generator)]
    speakers, vowels = len(kind_S), len(VOWELS)

    def deviation(shape: tuple[int, ...], spread: tuple[float, float]) -> Tensor:
        return torch.randn(*shape, 2, generator=generator) * torch.tensor(spread)

    log_hz = torch.tensor(AVERAGE_HZ, dtype=torch.float32).log()[:, kind_S].transpose(0, 1)[:, :, None]
    log_hz = log_hz + deviation((speakers, 1, 1), SPREAD[0])
    log_hz = log_hz + deviation((speakers, vowels, 1), SPREAD[1])
    log_hz = log_hz + deviation((speakers, vowels, REPETITIONS), SPREAD[2])
    label = torch.arange(vowels)[None, :, None].expand(speakers, vowels, REPETITIONS)
    train_hz_TD, test_hz_TD = (part.exp().reshape(-1, 2) for part in log_hz.tensor_split([TRAINING_SPEAKERS]))
    train_y_T, test_y_T = (part.reshape(-1) for part in label.tensor_split([TRAINING_SPEAKERS]))
    center_D, scale_D = train_hz_TD.mean(0), train_hz_TD.std(0)
    train_x_TD, test_x_TD = (train_hz_TD - center_D) / scale_D, (test_hz_TD - center_D) / scale_D
    return VowelTask(train_x_TD, train_y_T, test_x_TD, test_y_T, center_D, scale_D)


def one_hot(y_T: Tensor) -> Tensor:
    """The target of a vowel: 1 at its place and 0 elsewhere, [T, O]."""
    return torch.eye(len(VOWELS))[y_T]
