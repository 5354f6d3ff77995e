"""Loss-free balancing: after each optimizer step an expert's selection bias moves against its load.

DeepSeek-V3 selects by score + bias and weighs by score alone, so the bias steers the load without touching any
gradient (Wang et al. 2408.15664, Algorithm 1). γ = 1e-3 there.

    update_biases(model, {layer: counts_E})    # once an optimizer step, with the counts of the whole global batch

E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .deepseek_v3 import DeepSeekV3Router


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """b_i += γ · sign(mean count - count_i) (Algorithm 1), then centred: Σ b = 0. In place, no host sync.

    Centring changes no choice, since all scores of a token shift alike; it keeps the bias from drifting, which the
    paper leaves open (with one crowded expert all others would rise without end).

    Args:
        bias_E: float32, changed.
        counts_E: integers, the assignments of one optimizer step over the whole global batch: without padding, and
            without what recomputation and evaluation route.
        rate: γ.
    """
    bias_E += rate * torch.sign(counts_E.sum() - len(counts_E) * counts_E)  # E · (mean - count), exact in integers
    bias_E -= bias_E.mean()


def update_biases(model: nn.Module, counts: Mapping[int, Tensor]) -> None:
    """Update every loss-free bias of `model` that moves (`moe.bias_rate` > 0).

    Args:
        counts: layer id → int64 [E], the same on all ranks.
    """
    for router in model.modules():
        if isinstance(router, DeepSeekV3Router) and router.cfg.bias_rate > 0:
            update_bias(router.balance_bias, counts[router.layer], router.cfg.bias_rate)
