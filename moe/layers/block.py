"""One pre-norm block; its feed-forward slot is dense or a mixture of experts. T tokens, D width."""

from torch import Tensor, nn

from ..config import ModelConfig
from ..routing.record import Routing
from .attention import Attention
from .context import Context
from .ffn import FeedForward
from .latent import LatentAttention
from .moe import MoE
from .norm import RMSNorm
from .relative import RelativeBias


class Block(nn.Module):
    """x + attention(norm(x)), with an encoder x + cross(norm(x)), then x + ffn(norm(x)).

    Args:
        cfg: the model.
        layer: the block's id; an encoder's blocks have those from `cfg.layers` on.
        relative: the stack's biases by distance.
    """

    def __init__(self, cfg: ModelConfig, layer: int, relative: RelativeBias | None = None) -> None:
        super().__init__()
        self.layer, decodes = layer, layer < cfg.layers
        self.attention_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.attention: nn.Module = (
            Attention(cfg, layer, causal=decodes, relative=relative)
            if cfg.attention.latent is None
            else LatentAttention(cfg, layer)
        )
        crosses = decodes and cfg.encoder is not None
        self.cross_norm = RMSNorm(cfg.width, cfg.norm_eps) if crosses else None
        self.cross = Attention(cfg, layer, cross=True) if crosses else None
        self.ffn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        sparse = cfg.moe is not None and layer in cfg.moe_layers
        self.ffn: nn.Module = (
            MoE(cfg.moe, layer) if sparse and cfg.moe else FeedForward(cfg.width, cfg.ffn_width, cfg.activation)
        )

    def forward(self, x_TD: Tensor, positions_T: Tensor, ctx: Context) -> Tensor:
        """The block; a sparse one shows its routing to the context."""
        x_TD, routing = self.compute(x_TD, positions_T, ctx)
        if routing is not None:
            ctx.observe(self.layer, routing)
        return x_TD

    def compute(self, x_TD: Tensor, positions_T: Tensor, ctx: Context) -> tuple[Tensor, Routing | None]:
        """The block and its routing, which nobody has been shown: what may be computed again."""
        y_TD = self.attention(self.attention_norm(x_TD), positions_T, ctx)
        if self.cross is not None and self.cross_norm is not None:
            x_TD, normed_TD = self.cross_norm.after(x_TD, y_TD)
            y_TD = self.cross(normed_TD, positions_T, ctx)
        x_TD, normed_TD = self.ffn_norm.after(x_TD, y_TD)
        y_TD, routing = self.feed(normed_TD, ctx)
        return x_TD + y_TD, routing

    def feed(self, x_TD: Tensor, ctx: Context) -> tuple[Tensor, Routing | None]:
        """The feed-forward slot, and the routing of a sparse one."""
        return self.ffn(x_TD, ctx.route) if isinstance(self.ffn, MoE) else (self.ffn(x_TD), None)
