"""A dense projection whose kernel is chosen like any other operation's."""

from torch import Tensor, nn

from ...kernels import linear


class Linear(nn.Linear):
    """y = x · Wᵀ + b."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self.weight, self.bias)
