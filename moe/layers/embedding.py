"""The embedding of tokens. V vocabulary, D width."""

from torch import nn


class Embedding(nn.Embedding):
    """weight_VD[tokens_T]. On the meta device no numbers are drawn: that alone would import torch's compiler, 1 s."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
