"""What torch.compile leaves as it is: choosing experts and moving rows to them.

How many rows there are depends on the data, and a decision must outlive recomputation. A file of its own, imported when
somebody compiles, because `torch.compiler.disable` imports the compiler, which takes as long as importing torch.

T tokens, D width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..routing.record import RouteContext, Routing

if TYPE_CHECKING:
    from .moe import MoE


@torch.compiler.disable
def routed(layer: "MoE", x_TD: Tensor, context: RouteContext) -> tuple[Tensor, Routing]:
    """Σ_k w_k · E_{id_k}(x), and the routing."""
    routing, sent = layer.send(x_TD, context)
    return layer.mix(routing, sent, context), routing
