"""Multi-head, grouped-query and multi-query attention, asked of a context.

kv_heads = heads is MHA (Vaswani 1706.03762), 1 is MQA (Shazeer 1911.02150), between is GQA (Ainslie 2305.13245).
T tokens, D width, H heads, G kv heads, d head size, S tokens of the encoder.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...kernels import heads
from ..config import ModelConfig, check_heads
from .context import AttentionSpec, Context, Heads
from .linear import Linear
from .norm import RMSNorm
from .relative import RelativeBias
from .rotary import Rotary


class Attention(nn.Module):
    """o = W_o · attend(W_q x, W_k m, W_v m); m is x, or under cross-attention the encoder's hidden states.

    What a model has besides: biases, a clamp, norms of queries and keys, rotation, sinks (`AttentionConfig`).

    Args:
        cfg: the model.
        layer: which part of the cache is its own.
        causal: false in an encoder.
        cross: attend to the encoder.
        relative: the stack's biases by distance; they are the stack's parameters, not this module's.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        layer: int,
        *,
        causal: bool = True,
        cross: bool = False,
        relative: RelativeBias | None = None,
    ) -> None:
        super().__init__()
        own, d = cfg.attention, cfg.head_dim
        rotary = own.positions == "rotary"
        self.spec = AttentionSpec(
            layer=layer, heads=cfg.heads, kv_heads=cfg.kv_heads, head_dim=d,
            scale=own.scale or (d**-0.5 if rotary else 1.0), causal=causal and not cross, cross=cross,
            window=None if cross or not causal else own.window_of(layer),
        )  # fmt: skip
        self.rotary = Rotary(cfg, d) if rotary and not cross else None
        self.shared = () if relative is None else (relative,)  # in a tuple: not a submodule of this layer
        self.clip = own.clip
        self.plain = own.clip is None and not own.qkv_bias and own.qk_norm != "width"  # what `heads` knows
        self.wq = Linear(cfg.width, cfg.heads * d, bias=own.qkv_bias)
        self.wk = Linear(cfg.width, cfg.kv_heads * d, bias=own.qkv_bias)
        self.wv = Linear(cfg.width, cfg.kv_heads * d, bias=own.qkv_bias)
        self.wo = Linear(cfg.heads * d, cfg.width, bias=own.output_bias)
        sizes = {"none": None, "head": (d, d), "width": (cfg.heads * d, cfg.kv_heads * d)}[own.qk_norm]
        self.q_norm = RMSNorm(sizes[0], cfg.norm_eps) if sizes else None
        self.k_norm = RMSNorm(sizes[1], cfg.norm_eps) if sizes else None
        self.sinks = nn.Parameter(torch.zeros(cfg.heads)) if own.sinks and not cross else None

    def forward(self, x_TD: Tensor, positions_T: Tensor, ctx: Context) -> Tensor:
        q_THd, k_SGd, v_SGd = self._project(x_TD, positions_T, ctx)
        bias_HR = self.shared[0]() if self.shared else None
        o_THd = ctx.attend(self.spec, q_THd, Heads(k_SGd, v_SGd), self.sinks, bias_HR)
        return self.wo(o_THd.flatten(1))

    def _project(self, x_TD: Tensor, positions_T: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, normalised, clamped and rotated."""
        whole = all(isinstance(matrix, Linear) for matrix in (self.wq, self.wk, self.wv))
        if (
            whole
            and self.rotary is not None
            and self.plain
            and self.wk.out_features == self.spec.kv_heads * self.spec.head_dim
        ):
            cos_Th, sin_Th = self.rotary.angles(positions_T, ctx.turns, x_TD.dtype)
            q_norm, k_norm = self.q_norm, self.k_norm
            norms = () if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight, q_norm.eps)
            return heads(x_TD, self.wq.weight, self.wk.weight, self.wv.weight, cos_Th, sin_Th, *norms)
        m_SD = x_TD
        if self.spec.cross:
            assert ctx.memory is not None, "cross-attention needs the encoder's hidden states"
            m_SD = ctx.memory
        q_THd = self._heads(self.wq(x_TD), self.spec.heads, self.q_norm)
        k_SGd = self._heads(self.wk(m_SD), self.spec.kv_heads, self.k_norm)
        v_SGd = self._heads(self.wv(m_SD), self.spec.kv_heads, None)
        if self.rotary is not None:
            q_THd, k_SGd = self.rotary(positions_T, ctx.turns, q_THd, k_SGd)
        return q_THd, k_SGd, v_SGd

    def _heads(self, y: Tensor, heads: int, norm: RMSNorm | None) -> Tensor:
        """Normalised over a head or over all, clamped, and seen as heads."""
        y_THd = y.unflatten(-1, (heads, self.spec.head_dim))
        if norm is not None:
            y_THd = norm(y_THd) if norm.weight.numel() == self.spec.head_dim else norm(y).view_as(y_THd)
        return y_THd if self.clip is None else y_THd.clamp(-self.clip, self.clip)

    def keep_part(self, rank: int, size: int) -> tuple[str, ...]:
        """Attend for part `rank` of `size` equal parts of the heads, and the K/V heads that these read.

        With fewer K/V heads than parts, several parts read one: then W_k and W_v stay whole.

        Returns:
            which matrices stay whole.

        Raises:
            ConfigError: the heads can not be divided so.
        """
        heads, kv_heads, d = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        check_heads(heads, kv_heads, size)
        self.spec = replace(self.spec, heads=heads // size, kv_heads=max(kv_heads // size, 1))
        if kv_heads >= size:
            return ()
        first = rank * kv_heads // size * d
        for matrix in (self.wk, self.wv):
            matrix.register_forward_hook(lambda _, x, y_TGd: y_TGd[:, first : first + d])
        return ("wk", "wv")
