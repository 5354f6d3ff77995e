"""A model cut into the stages of a pipeline: what a rank keeps of it, and one stage's forward pass.

The model has `embed`, `blocks`, `norm`, `head` (None: tied to the embedding) and `logits(x_TD, ctx)`. What a rank does
not hold is gone from its model; what it keeps has the names of the whole model, so checkpoints fit any layout. With
tied embeddings the last stage holds a copy of the embedding: the first and last stage sum its gradient.

T tokens held here, D width.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def keep_stages(model: nn.Module, held: Mapping[int, range], last: int) -> None:
    """Drop from `model`, in place, what the stages `held` (number → layers) of stages 0 to `last` do not compute with.

    Works on the meta device, so that no rank ever holds the whole model.
    """
    parts: Any = model
    kept = {str(layer) for layers in held.values() for layer in layers}
    for name, _ in list(parts.blocks.named_children()):
        if name not in kept:
            delattr(parts.blocks, name)
    tied = parts.head is None
    if 0 not in held and not (tied and last in held):
        del parts.embed
    if last not in held:
        del parts.norm
        if not tied:
            del parts.head


class Stage(nn.Module):
    """Stage `number` of 0 to `last` of `model`: embedding (on the first), `layers`, norm and head (on the last)."""

    def __init__(self, model: nn.Module, number: int, last: int, layers: range) -> None:
        super().__init__()
        self.model: Any = model
        self.number, self.layers = number, layers
        self.is_first, self.is_last = number == 0, number == last

    def forward(self, given: Tensor, positions_A: Tensor, ctx: Any) -> Tensor:
        """Token ids [T] on the first stage, else x_TD → x_TD, on the last stage what the model returns."""
        x_TD = self.model.embed(given) if self.is_first else given
        for layer in self.layers:
            x_TD = self.model.blocks.get_submodule(str(layer))(x_TD, positions_A, ctx)
        return self.model.finish(x_TD, ctx) if self.is_last else x_TD
