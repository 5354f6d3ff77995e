"""Do the experts differ? The loss when every token is sent to the wrong ones.

Each expert takes the work of its neighbour: routing, weights and drops stay as they were, only the function applied
changes. Experts that specialised make the loss jump; interchangeable ones do not. It works at any expert-parallel size,
because the routed ids are shifted and no weight moves.

T tokens, D width, K choices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...parallel.dispatch.local import Experts, LocalDispatcher
from ..layers.moe import MoE


class _Shifted(LocalDispatcher):
    """A dispatcher that sends what is meant for expert e to expert e + shift (mod E)."""

    def __init__(self, inner: Any, shift: int) -> None:
        self.inner, self.shift = inner, shift

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, kept_TK: Tensor, num_experts: int, key_TK: Tensor | None = None
    ) -> Any:
        return self.inner.dispatch(x_TD, (ids_TK + self.shift) % num_experts, kept_TK, num_experts, key_TK)

    def combine(self, sent: Any, experts: Experts, weights_TK: Tensor) -> Tensor:
        return self.inner.combine(sent, experts, weights_TK)


@contextmanager
def shuffled_experts(model: nn.Module, shift: int = 1) -> Iterator[None]:
    """Inside the block every MoE layer applies expert (e + shift) mod E where its router chose e; undone afterwards.

    with shuffled_experts(model):
        worse = evaluate(model, tokenizer, documents, seq_len=256)
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    originals = [layer.dispatcher for layer in layers]
    try:
        for layer in layers:
            layer.dispatcher = _Shifted(layer.dispatcher, shift)
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.dispatcher = original
