"""The training and evaluation context: attention over packed sequences.

T tokens, B sequences, H heads, G kv heads, d head size.
"""

from torch import Tensor

from ...kernels import varlen_attention
from ...parallel.spread import Spread
from ..layers.context import AttentionSpec, Heads
from ..routing.record import RouteContext, Routing


class VarlenContext:
    """Sequences lie one after another; attention never crosses their borders. One object serves one forward pass.

    Args:
        cu_seqlens_B1: int [B+1], token offsets of the sequences.
        route: the routers' surroundings.
        logit_rows: int64 rows whose logits are wanted; None = all.
        spread: how the sequences' tokens are divided over ranks; None = all are here.

    Attributes:
        routings: layer id → Routing of this forward pass, without gradients: what is noted keeps no graph alive.
    """

    def __init__(
        self,
        cu_seqlens_B1: Tensor,
        route: RouteContext | None = None,
        logit_rows: Tensor | None = None,
        spread: Spread | None = None,
    ) -> None:
        self.cu_seqlens_B1 = cu_seqlens_B1
        self.route = route or RouteContext()
        self.logit_rows = logit_rows
        self.spread = spread
        self.routings: dict[int, Routing] = {}

    def attend(self, spec: AttentionSpec, q_THd: Tensor, kv: Heads) -> Tensor:
        return varlen_attention(
            q_THd, kv.k, kv.v, self.cu_seqlens_B1, scale=spec.scale, causal=spec.causal, window=spec.window
        )

    def observe(self, layer: int, routing: Routing) -> None:
        self.routings[layer] = routing.detach()
