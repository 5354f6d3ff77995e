"""A mixture of linear experts under a linear softmax gate: the smallest module the three objectives can train.

T cases, E experts, D inputs, O outputs.
"""

import torch
from torch import Tensor, nn

from ...configs.typed import check
from .objectives import blend

INIT_STD = 0.1  # small: at the start every expert is chosen about equally


class AdaptiveMixture(nn.Module):
    """E linear maps o_i = W_i x + b_i, weighed by p = softmax(V x + c) (Jacobs et al. 1991, figure 1).

    Args:
        num_experts, in_features, out_features: E, D and O, each at least 1.
        generator: draws the weights, N(0, 0.1²); the biases of the experts too, since equal experts would stay equal.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "in_features": in_features, "out_features": out_features}
        for field, size in sizes.items():
            check(size >= 1, field, size, "must be at least 1", "give a positive size")

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(INIT_STD * torch.randn(*shape, generator=generator))

        self.weight_EOD = draw(num_experts, out_features, in_features)
        self.bias_EO = draw(num_experts, out_features)
        self.gate_ED = draw(num_experts, in_features)
        self.gate_bias_E = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """What every expert answers, and the gate's logits: [T, E, O] and [T, E]."""
        outputs_TEO = torch.einsum("td,eod->teo", x_TD, self.weight_EOD) + self.bias_EO
        logits_TE = x_TD @ self.gate_ED.T + self.gate_bias_E
        return outputs_TEO, logits_TE

    def predict(self, x_TD: Tensor) -> Tensor:
        """The experts' answers blended by the gate: [T, O]."""
        return blend(*self(x_TD))
