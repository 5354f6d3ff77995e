"""Linear warm-up, then a fall, over the progress of a run that is measured in steps or in seconds.

With p in [0, 1] the share of what follows the warm-up, and f = `optim.final`, the rate is f + (1 - f) · g(p):

    cosine      (1 + cos πp) / 2                    SGDR, Loshchilov & Hutter 1608.03983 eq. 5, one cycle
    linear      1 - p                               Defazio et al. 2310.07831
    wsd         1 - √q, q the share of the last `optim.decay` of the run behind us
                                                    MiniCPM 2404.06395 §4, cooled down as Hägele et al. 2405.18392 §3
    constant    1

By seconds the clock is rank 0's, voted, so that every rank takes the same rate and stops after the same step.
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
    return optim.final + (1 - optim.final) * _fall(optim, done)


def _fall(optim: OptimConfig, done: float) -> float:
    """g at progress `done` behind the warm-up: 1 at its end, and 0 at the run's unless the rate is constant."""
    share = (done - optim.warmup) / (1 - optim.warmup)
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if optim.schedule == "linear":
        return 1 - share
    if optim.schedule == "wsd":
        return 1 - math.sqrt(max(1 - (1 - done) / optim.decay, 0.0))
    return 1.0
