"""Multi-head, grouped-query and multi-query attention with rotary positions, asked of a context.

kv_heads = heads is MHA (Vaswani 1706.03762), 1 is MQA (Shazeer 1911.02150), between is GQA (Ainslie 2305.13245).
T tokens, D width, H heads, G kv heads, d head size.
"""

from dataclasses import replace

from torch import Tensor, nn

from ...kernels import rope
from ..config import ModelConfig, check_heads
from .context import AttentionSpec, Context, Heads


class Attention(nn.Module):
    """o = W_o · attend(rope(W_q x), rope(W_k x), W_v x)."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.spec = AttentionSpec(
            layer=layer, heads=cfg.heads, kv_heads=cfg.kv_heads, head_dim=cfg.head_dim, scale=cfg.head_dim**-0.5
        )
        self.theta = cfg.rope_theta
        self.wq = nn.Linear(cfg.width, cfg.heads * cfg.head_dim, bias=False)
        self.wk = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=False)
        self.wv = nn.Linear(cfg.width, cfg.kv_heads * cfg.head_dim, bias=False)
        self.wo = nn.Linear(cfg.heads * cfg.head_dim, cfg.width, bias=False)

    def forward(self, x_TD: Tensor, positions_T: Tensor, ctx: Context) -> Tensor:
        heads, kv_heads = (-1, self.spec.heads, self.spec.head_dim), (-1, self.spec.kv_heads, self.spec.head_dim)
        q_THd = rope(self.wq(x_TD).view(heads), positions_T, self.theta)
        k_TGd = rope(self.wk(x_TD).view(kv_heads), positions_T, self.theta)
        o_THd = ctx.attend(self.spec, q_THd, Heads(k_TGd, self.wv(x_TD).view(kv_heads)))
        return self.wo(o_THd.flatten(1))

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
