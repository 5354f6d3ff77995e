"""The transformer, dense or sparse, with an encoder or without: the same object trains and serves.

T tokens, D width, V vocabulary, R rows whose logits are wanted, S tokens of the encoder.
"""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..layers.block import Block
from ..layers.context import Context
from ..layers.embedding import Embedding, Head
from ..layers.norm import RMSNorm
from ..layers.quantized import QuantizedEmbedding, store_quantized
from ..layers.relative import RelativeBias


class Encoder(nn.Module):
    """The blocks of an encoder and their norm; it embeds with the decoder's embedding."""

    def __init__(self, cfg: ModelConfig, layers: int) -> None:
        super().__init__()
        self.relative = RelativeBias(cfg, causal=False) if cfg.attention.positions == "relative" else None
        self.blocks = nn.ModuleList(Block(cfg, cfg.layers + layer, self.relative) for layer in range(layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)

    def forward(self, x_SD: Tensor, positions_S: Tensor, ctx: Context) -> Tensor:
        for block in self.blocks:
            x_SD = block(x_SD, positions_S, ctx)
        return self.norm(x_SD)


class Decoder(nn.Module):
    """Embedding, blocks, norm, head (tied to the embedding or not); before them an encoder, if there is one."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed: Embedding | QuantizedEmbedding = Embedding(cfg.vocab_size, cfg.width)
        self.relative = RelativeBias(cfg, causal=True) if cfg.attention.positions == "relative" else None
        self.blocks = nn.ModuleList(Block(cfg, layer, self.relative) for layer in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.head: Head | QuantizedEmbedding | None = None if cfg.tie_embeddings else Head(cfg.width, cfg.vocab_size)
        self.encoder = None if cfg.encoder is None else Encoder(cfg, cfg.encoder.layers)
        if cfg.quantization is not None:
            store_quantized(self, cfg.quantization)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        ctx: Context,
        source: tuple[Tensor, Tensor, Context] | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens_T: int64 token ids of packed sequences.
            positions_T: int64 position of each token in its own sequence.
            ctx: how to attend, how to route, which rows are wanted, what an encoder has made of its own tokens.
            source: the arguments of `encode`, whose result becomes `ctx.memory` before anything else.

        Returns:
            logits_RV for the rows `ctx.logit_rows` (all T when None); of a context with a loss, that.
        """
        if source is not None:
            ctx.memory = self.encode(*source)
        return self.finish(self.hidden(tokens_T, positions_T, ctx), ctx)

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, ctx: Context) -> Tensor:
        """What the last block returns for every token, [T, D]; `logits` turns rows of it into logits."""
        x_TD = self.embed(tokens_T)
        for block in self.blocks:
            x_TD = block(x_TD, positions_T, ctx)
        return x_TD

    def encode(self, tokens_S: Tensor, positions_S: Tensor, ctx: Context) -> Tensor:
        """The encoder's hidden states [S, D], the `memory` of a forward pass; `ctx` is the encoder's own."""
        assert self.encoder is not None, "a decoder-only model encodes nothing"
        return self.encoder(self.embed(tokens_S), positions_S, ctx)

    def finish(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """What the forward pass returns, of what the last block returned: logits, or `ctx.loss` of them."""
        return self.logits(x_TD, ctx) if ctx.loss is None else ctx.loss(self.into_head(x_TD), self.outlet)

    def logits(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """Logits [R, V] of the wanted rows, from what the last block returned."""
        return self.outlet.project(self.into_head(x_TD if ctx.logit_rows is None else x_TD[ctx.logit_rows]))

    def into_head(self, x_RD: Tensor) -> Tensor:
        """Normed rows."""
        x_RD = self.norm(x_RD)
        return x_RD if self.cfg.logit_scale == 1 else x_RD * self.cfg.logit_scale

    @property
    def outlet(self) -> Embedding | Head | QuantizedEmbedding:
        """What turns rows into logits: the head, or the embedding that it is tied to."""
        return self.embed if self.head is None else self.head

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states outside of autocast."""
        return self.norm.weight.dtype

    def tell_dtype(self) -> None:
        """Let a rounded embedding, whose numbers have no dtype of the model's, give rows of it."""
        if isinstance(self.embed, QuantizedEmbedding):
            self.embed.dtype = self.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.norm.weight.device

    @property
    def all_blocks(self) -> list[nn.Module]:
        """The blocks held here, the encoder's after the decoder's."""
        return [*self.blocks, *(() if self.encoder is None else self.encoder.blocks)]

    def plan(self) -> dict[str, str]:
        """How each parameter may be spread over ranks: name pattern → placement; what is not named is replicated."""
        return {
            "embed.weight": "vocab",
            "head.weight": "vocab",
            "*blocks.*.attention.w[qkv].*": "column",
            "*blocks.*.attention.sinks": "column",
            "*blocks.*.attention.wkv.weight": "column",
            "*blocks.*.attention.wo.*": "row",
            "*blocks.*.ffn.w_in.*": "gated" if self.cfg.activation.startswith("swiglu") else "column",
            "*blocks.*.ffn.w_out.*": "row",
            "*blocks.*.ffn.experts.*": "expert",
        }
