"""The one seam between a model and where it runs: `Context`.

Training attends over packed sequences, serving writes to paged slots and attends through block tables; the model asks
the context and never knows. T tokens, H heads, G kv heads, d head size.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..routing.record import RouteContext, Routing


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one attention layer is, as the context must know it. `scale` multiplies q·k."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    window: int | None = None


@dataclass(frozen=True)
class Heads:
    """Keys and values of the tokens at hand, both [T, G, d], keys already rotated."""

    k: Tensor
    v: Tensor


class Context(Protocol):
    """One forward pass's surroundings.

    Attributes:
        route: groups, valid tokens and random keys for the routers.
        logit_rows: int64 rows whose logits are wanted; None = all.
    """

    route: RouteContext
    logit_rows: Tensor | None

    def attend(self, spec: AttentionSpec, q_THd: Tensor, kv: Heads) -> Tensor:
        """Attention output [T, H, d]; serving also stores `kv`."""
        ...

    def observe(self, layer: int, routing: Routing) -> None:
        """Take note of a layer's routing (metrics, losses, tracing)."""
        ...
