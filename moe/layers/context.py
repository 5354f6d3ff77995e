"""The one seam between a model and where it runs: `Context`.

Training attends over packed sequences, serving writes to paged slots and attends through block tables; the model asks
the context and never knows. T tokens, H heads, G kv heads, d head size.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..routing.record import RouteContext, Routing

Turns = dict[Hashable, tuple[Tensor, Tensor, Tensor]]
"""Of each kind of rotation: the positions [T], and the cosine and sine of each position's angles [T, d / 2]."""


class Outlet(Protocol):
    """What makes logits of normed rows: a head, or the embedding that it is tied to."""

    def project(self, x_RD: Tensor) -> Tensor:
        """Logits [R, V]."""
        ...

    def losses(self, x_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Cross entropy [T] of the logits, which need never exist all at once."""
        ...


Loss = Callable[[Tensor, Outlet], Tensor]
"""Normed rows [T, D], and what would make logits of them → losses [T], or several a token [T, P]."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one attention layer is, as the context must know it.

    Args:
        layer: which part of the cache is its own.
        heads: H.
        kv_heads: G.
        head_dim: d of queries and keys.
        scale: multiplies q · k.
        causal: a query sees nothing after it.
        window: a query sees its own position and the window - 1 before it.
        cross: the keys and values are the encoder's: of other tokens than the queries, all of which are seen.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    window: int | None = None
    cross: bool = False


@dataclass(frozen=True)
class Heads:
    """Keys and values of the tokens at hand, both [T, G, d], keys already rotated.

    Under cross-attention the tokens are those of `Context.memory`.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Latent:
    """Keys and values of the tokens at hand as one latent (DeepSeek-V2 2405.04434 eq. 9-14), queries beside them.

    Head h's key is (w_uk[h] · c, k_rope), its value w_uv[h] · c; its query is (q_nope, q_rope).

    Args:
        c: [T, rank], normalised.
        k_rope: [T, rope_dim], rotated, the same for all heads.
        w_kv: [H, d + value_dim, rank], of each head w_uk above w_uv.
        key_dim: d.
    """

    c: Tensor
    k_rope: Tensor
    w_kv: Tensor
    key_dim: int

    @property
    def w_uk(self) -> Tensor:
        """[H, d, rank]."""
        return self.w_kv[:, : self.key_dim]

    @property
    def w_uv(self) -> Tensor:
        """[H, value_dim, rank]."""
        return self.w_kv[:, self.key_dim :]


class Context(Protocol):
    """One forward pass's surroundings.

    Attributes:
        route: groups, valid tokens and random keys for the routers.
        logit_rows: int64 rows whose logits are wanted; None = all.
        memory: the encoder's hidden states [S, D] that cross-attention has not seen yet; None without an encoder.
        turns: what the layers' `Rotary` have found of the pass's positions, for the next layers.
        loss: what the model returns in place of logits, which then need never exist at once. None in serving.
    """

    route: RouteContext
    logit_rows: Tensor | None
    memory: Tensor | None
    turns: Turns
    loss: Loss | None

    def attend(
        self,
        spec: AttentionSpec,
        q_THd: Tensor,
        kv: Heads | Latent,
        sinks_H: Tensor | None = None,
        bias_HR: Tensor | None = None,
    ) -> Tensor:
        """Attention output [T, H, d of values]; serving also stores `kv`.

        `sinks_H` and `bias_HR` are as in `kernels.varlen_attention`.
        """
        ...

    def observe(self, layer: int, routing: Routing) -> None:
        """Take note of a layer's routing (metrics, losses, tracing)."""
        ...
