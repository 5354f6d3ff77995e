"""Expert dropout (Switch 2101.03961 §2.4): hidden units inside the routed experts vanish in training.

T tokens, F hidden width, K choices, N rows of the experts held here.
"""

import torch
from torch import Tensor

from ...kernels import uniform
from ...kernels.random import DROPOUT
from ..config import MoEConfig
from ..routing.record import RouteContext


def row_keys(ids_TK: Tensor, context: RouteContext) -> Tensor:
    """key_TK: global token index · K + choice, which names an assignment on any rank, and when it is recomputed."""
    tokens, top_k = ids_TK.shape
    device = ids_TK.device
    index_T = torch.arange(tokens, device=device) if context.index_T is None else context.index_T
    return index_T[:, None] * top_k + torch.arange(top_k, device=device)


def dropped_units(cfg: MoEConfig, layer: int, key_N: Tensor, context: RouteContext) -> Tensor:
    """Which hidden units of each row are dropped: bool [N, F], each True with probability `expert_dropout`.

    Drawn by (seed, step, layer, key), so a row loses the same units on whichever rank its expert lives.
    """
    draw = {"step": context.step, "layer": layer, "purpose": DROPOUT, "count": cfg.expert_width}
    return uniform(context.seed, key_N, **draw) < cfg.expert_dropout
