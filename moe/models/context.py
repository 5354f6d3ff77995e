"""The training and evaluation context: attention over packed sequences.

T tokens, B sequences, H heads, G kv heads, d head size, W tokens over all context ranks.
"""

from functools import partial

import torch
from torch import Tensor

from ...kernels import varlen_attention
from ...kernels.registry import invariant
from ...parallel.context import Piece, gather_keys, pieces
from ...parallel.spread import Spread
from ..layers.context import AttentionSpec, Heads, Latent, Loss, Turns
from ..layers.latent import absorb, expand, release
from ..routing.record import RouteContext, Routing


class VarlenContext:
    """Sequences lie one after another; attention never crosses their borders. One object serves one forward pass.

    Args:
        cu_seqlens_B1: int [B+1], token offsets of the sequences.
        route: the routers' surroundings.
        logit_rows: int64 rows whose logits are wanted; None = all.
        spread: how the sequences' tokens are divided over ranks; None = all are here.
        memory: the encoder's hidden states [S, D]; None without an encoder.
        cu_memory_B1: int [B+1], where each sequence's part of `memory` begins.

    Attributes:
        loss: what the model returns in place of logits; it then keeps none.
        states: block → what it returned, where somebody has asked for it (`train/distill.py`); None = nobody has.
        routings: layer id → Routing of this forward pass, without gradients: what is noted keeps no graph alive.
    """

    def __init__(
        self,
        cu_seqlens_B1: Tensor,
        route: RouteContext | None = None,
        logit_rows: Tensor | None = None,
        spread: Spread | None = None,
        memory: Tensor | None = None,
        cu_memory_B1: Tensor | None = None,
    ) -> None:
        self.cu_seqlens_B1 = cu_seqlens_B1
        self.route = route or RouteContext()
        self.logit_rows = logit_rows
        self.spread = spread
        self.memory = memory
        self.cu_memory_B1 = cu_memory_B1
        self.loss: Loss | None = None
        self.states: dict[int, Tensor] | None = None
        self.routings: dict[int, Routing] = {}
        self.turns: Turns = {}
        self._found: dict[int | None, list[Piece]] = {}

    def attend(
        self,
        spec: AttentionSpec,
        q_THd: Tensor,
        kv: Heads | Latent,
        sinks_H: Tensor | None = None,
        bias_HR: Tensor | None = None,
    ) -> Tensor:
        if isinstance(kv, Latent) and invariant():  # serving's form, whose bits are wanted
            latents_T1 = Heads(torch.cat((kv.c, kv.k_rope), -1)[:, None], kv.c[:, None])
            return release(self.attend(spec, absorb(q_THd, kv), latents_T1, sinks_H, bias_HR), kv)
        kv = expand(kv)
        attend = partial(varlen_attention, scale=spec.scale, window=spec.window, sinks_H=sinks_H, bias_HR=bias_HR)
        if self.spread is None or self.spread.mesh.size("cp") == 1:
            cu_k_B1 = self.cu_memory_B1 if spec.cross else None
            return attend(q_THd, kv.k, kv.v, self.cu_seqlens_B1, causal=spec.causal, cu_k_B1=cu_k_B1)
        assert spec.causal, "context parallelism gives each rank an equal share of causal attention"
        k_WGd, v_WGd = gather_keys(kv.k, kv.v, self.spread)
        outputs = [
            attend(q_THd[piece.queries], k_WGd[piece.keys], v_WGd[piece.keys], piece.cu_q_B1, cu_k_B1=piece.cu_k_B1)
            for piece in self._pieces(self.spread, spec.window)
        ]
        return torch.cat(outputs)

    def _pieces(self, spread: Spread, window: int | None) -> list[Piece]:
        """Found once a forward pass: the layers share them."""
        if window not in self._found:
            self._found[window] = pieces(self.cu_seqlens_B1, spread, window)
        return self._found[window]

    def observe(self, layer: int, routing: Routing) -> None:
        self.routings[layer] = routing.detach()
