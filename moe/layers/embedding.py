"""The two ends of a model: from tokens to rows, and from rows to logits. T tokens, R rows, V vocabulary, D width."""

from torch import Tensor, nn

from ...kernels import linear, linear_cross_entropy


class Vocabulary(nn.Module):
    """A row of `weight` [V, D] for every token."""

    weight: Tensor

    def project(self, x_RD: Tensor) -> Tensor:
        """Logits [R, V]."""
        return linear(x_RD, self.weight)

    def losses(self, x_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Cross entropy [T] of the logits, 0 where the target is -1."""
        return linear_cross_entropy(x_TD, self.weight, targets_T)


class Embedding(Vocabulary, nn.Embedding):
    """weight_VD[tokens_T]. On the meta device no numbers are drawn: that alone would import torch's compiler, 1 s."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Head(Vocabulary, nn.Linear):
    """A matrix of logits that is not the embedding."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)
