"""Multi-head latent attention (DeepSeek-V2 2405.04434 §2.1, V3 2412.19437 §2.1.1), asked of a context.

    c = norm(W_dkv x)    k_h = (W_uk,h c, rope(W_kr x))    v_h = W_uv,h c    q_h = (W_uq,h c', rope(W_qr,h c'))

with c' = norm(W_dq x), or x itself. Keys and values are kept as (c, rope(W_kr x)), rank + rope_dim numbers a token.

T tokens, D width, H heads, d head size without positions, r rope_dim, c rank of the latent.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...kernels import head_gemm, linear
from ..config import ModelConfig, check_heads
from .context import AttentionSpec, Context, Heads, Latent
from .linear import Linear
from .norm import RMSNorm
from .rotary import Rotary


class LatentAttention(nn.Module):
    """o = W_o · attend(q, latent)."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        own = cfg.attention.latent
        assert own is not None
        self.own, size = own, cfg.head_dim + own.rope_dim
        self.spec = AttentionSpec(
            layer=layer, heads=cfg.heads, kv_heads=cfg.heads, head_dim=size,
            scale=cfg.attention.scale or size**-0.5, window=cfg.attention.window_of(layer),
        )  # fmt: skip
        self.rotary = Rotary(cfg, own.rope_dim)
        bias = cfg.attention.qkv_bias
        self.wq_down = None if own.query_rank is None else Linear(cfg.width, own.query_rank, bias=bias)
        self.q_norm = None if own.query_rank is None else RMSNorm(own.query_rank, own.eps)
        self.wq = Linear(own.query_rank or cfg.width, cfg.heads * size, bias=False)
        self.wkv_down = Linear(cfg.width, own.rank + own.rope_dim, bias=bias)
        self.kv_norm = RMSNorm(own.rank, own.eps)
        self.wkv = Linear(own.rank, cfg.heads * (cfg.head_dim + own.value_dim), bias=False)
        self.wo = Linear(cfg.heads * own.value_dim, cfg.width, bias=cfg.attention.output_bias)

    def forward(self, x_TD: Tensor, positions_T: Tensor, ctx: Context) -> Tensor:
        own, nope = self.own, self.spec.head_dim - self.own.rope_dim
        q_TQ = x_TD if self.wq_down is None or self.q_norm is None else self.q_norm(self.wq_down(x_TD))
        q_THd, q_THr = self.wq(q_TQ).unflatten(-1, (self.spec.heads, -1)).split((nope, own.rope_dim), -1)
        c_Tc, k_Tr = self.wkv_down(x_TD).split((own.rank, own.rope_dim), -1)
        q_THr, k_T1r = self.rotary(positions_T, ctx.turns, q_THr, k_Tr[:, None])
        w_kv = self.wkv.weight.unflatten(0, (self.spec.heads, -1))
        latent = Latent(self.kv_norm(c_Tc), k_T1r[:, 0], w_kv, nope)
        return self.wo(ctx.attend(self.spec, torch.cat((q_THd, q_THr), -1), latent).flatten(1))

    def keep_part(self, rank: int, size: int) -> tuple[str, ...]:
        """Attend for part `rank` of `size` equal parts of the heads; what makes the latents is no head's and stays.

        Raises:
            ConfigError: the heads can not be divided so.
        """
        heads = self.spec.heads
        check_heads(heads, heads, size)
        self.spec = replace(self.spec, heads=heads // size, kv_heads=heads // size)
        return ()


def expand(kv: Heads | Latent) -> Heads:
    """Keys and values by head, whatever they were: attention over all tokens at once is cheapest with them."""
    if isinstance(kv, Heads):
        return kv
    heads = len(kv.w_kv)
    kv_THx = linear(kv.c, kv.w_kv.flatten(0, 1)).unflatten(-1, (heads, -1))
    k_THd, v_THv = kv_THx.tensor_split((kv.key_dim,), -1)
    k_THr = kv.k_rope[:, None].expand(-1, heads, -1).to(k_THd.dtype)
    return Heads(torch.cat((k_THd, k_THr), -1), v_THv)


def absorb(q_THd: Tensor, kv: Latent) -> Tensor:
    """Queries [T, H, c + r] that meet the latents themselves: q_nope · W_uk beside q_rope; all heads read one key."""
    q_THn, q_THr = q_THd.tensor_split((kv.key_dim,), -1)
    return torch.cat((head_gemm(q_THn, kv.w_uk), q_THr), -1)


def release(o_THc: Tensor, kv: Latent) -> Tensor:
    """Outputs [T, H, v] from the latents' weighted sums: W_uv after attention instead of before."""
    return head_gemm(o_THc, kv.w_uv.mT)
