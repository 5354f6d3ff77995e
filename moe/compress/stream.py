"""Hidden states of packed windows on their way through a model whose blocks come one at a time. T tokens, D width."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...parallel.mesh import Mesh
from ..eval.perplexity import Window, nats_of, pack
from ..layers.block import Block
from ..routing.record import Routing
from ..train.part import Part, part_of


class Stream:
    """Windows of text between two blocks.

    Args:
        windows: what is read.
        batch: windows of one forward call.
        filler: id of padding.
        dropless: ignore the experts' capacity.
    """

    def __init__(self, windows: Sequence[Window], batch: int, filler: int, *, dropless: bool) -> None:
        mesh = Mesh.alone(torch.device("cpu"))
        packed = (pack(windows[first : first + batch], 1, filler) for first in range(0, len(windows), batch))
        self.parts: list[Part] = [part_of(one, mesh, propagate_nan=False, dropless=dropless) for one in packed]
        self.states: list[Tensor] = []

    def enter(self, embed: Callable[[Tensor], Tensor]) -> None:
        """Begin with the embedding."""
        self.states = [embed(part.tokens_T) for part in self.parts]

    @torch.no_grad()
    def through(self, block: Block) -> None:
        """On to behind `block`."""
        for i, (part, x_TD) in enumerate(zip(self.parts, self.states, strict=True)):
            self.states[i] = block(x_TD, part.positions_A, part.ctx)
            part.ctx.turns.clear()

    @torch.no_grad()
    def show(self, block: Block) -> None:
        """Let `block` see its rows; the stream stays where it is."""
        before = list(self.states)
        self.through(block)
        self.states = before

    def routings(self, layer: int) -> list[Routing]:
        """What the routers of a sparse block decided, part by part."""
        return [part.ctx.routings[layer] for part in self.parts]

    @torch.no_grad()
    def loss(self, finish: nn.Module | Callable[..., Tensor]) -> float:
        """Nats a token, where `finish(x_TD, ctx)` makes the last block's rows logits."""
        nats = sum(
            float(nats_of(part, lambda *_, x=x_TD, part=part: finish(x, part.ctx)))
            for part, x_TD in zip(self.parts, self.states, strict=True)
        )
        return nats / max(sum(int((part.targets_T >= 0).sum()) for part in self.parts), 1)
