"""Expert dropout (Switch 2101.03961 §2.4): hidden units inside the routed experts vanish in training.

T tokens, F hidden width, K choices, N rows of the experts held here.
"""

import torch
from torch import Tensor

from ...kernels import uniform
from ...kernels.random import DROPOUT
from ...parallel.dispatch.local import Dispatched, LocalDispatcher
from ..config import MoEConfig
from ..routing.record import RouteContext


def dropped_units(
    cfg: MoEConfig, layer: int, sent: Dispatched, dispatcher: LocalDispatcher, context: RouteContext
) -> Tensor:
    """Which hidden units of each row are dropped: bool [N, F], each True with probability `expert_dropout`.

    Keyed by (seed, step, layer, global token index · K + choice), so a row loses the same units on whichever rank its
    expert lives, and when it is recomputed.
    """
    tokens, top_k = sent.slot_TK.shape
    device = sent.slot_TK.device
    index_T = torch.arange(tokens, device=device) if context.index_T is None else context.index_T
    key_TK = index_T[:, None] * top_k + torch.arange(top_k, device=device)
    key_N = dispatcher.carry(key_TK, sent)
    draw = {"step": context.step, "layer": layer, "purpose": DROPOUT, "count": cfg.expert_width}
    return uniform(context.seed, key_N, **draw) < cfg.expert_dropout
