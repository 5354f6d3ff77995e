"""One pre-norm decoder block; its feed-forward slot is dense or a mixture of experts. T tokens, D width."""

from torch import Tensor, nn

from ..config import ModelConfig
from .attention import Attention
from .context import Context
from .ffn import FeedForward
from .moe import MoE
from .norm import RMSNorm


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.attention = Attention(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        sparse = cfg.moe is not None and layer in cfg.moe_layers
        self.ffn: nn.Module = MoE(cfg.moe, layer) if sparse and cfg.moe else FeedForward(cfg.width, cfg.ffn_width)

    def forward(self, x_TD: Tensor, positions_T: Tensor, ctx: Context) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), positions_T, ctx)
        return x_TD + self.feed(self.ffn_norm(x_TD), ctx)

    def feed(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """The feed-forward slot; a sparse one shows its routing to the context."""
        if not isinstance(self.ffn, MoE):
            return self.ffn(x_TD)
        y_TD, routing = self.ffn(x_TD, ctx.route)
        ctx.observe(self.layer, routing)
        return y_TD
