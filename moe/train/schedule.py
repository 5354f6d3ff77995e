"""Linear warm-up, then a cosine, over the progress of a run that is measured in steps or in seconds.

(SGDR, Loshchilov & Hutter 1608.03983 eq. 5, one cycle.) By seconds the clock is rank 0's, voted, so that every rank
takes the same rate and stops after the same step.
"""

import math

from .config import OptimConfig, TrainConfig


def progress(train: TrainConfig, step: int, seconds: float) -> float:
    """Share of the run behind us before optimizer step number `step` (from 0); 1 or more = finished."""
    if train.seconds is not None:
        return seconds / train.seconds
    return step / (train.steps or 1)


def rate(optim: OptimConfig, done: float, step: int) -> float:
    """The factor on the peak learning rates at progress `done`.

    The first step is never wasted on a rate of zero: at least 1 / (step + 100) of the warm-up is taken as done.
    """
    done = min(max(done, optim.warmup / (step + 100)), 1.0)
    if done < optim.warmup:
        return done / optim.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (done - optim.warmup) / (1 - optim.warmup)))
    return optim.final + (1 - optim.final) * cosine
