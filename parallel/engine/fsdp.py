"""The FSDP2 engine: as `native`, for a model whose parameters `parallel.fsdp.divide` has divided."""

import torch
from torch import Tensor, nn

from ..fsdp import hand_over_gradients
from ..gradients import sum_in_buckets
from ..process import naming
from .native import NativeEngine


class FsdpEngine(NativeEngine):
    """Trains a divided model: its own hooks gather parameters and scatter gradients, in every micro-batch.

    What is not divided (vectors, routers) is summed after the last one. Otherwise as `NativeEngine`.
    """

    def _replicate(self) -> nn.Module:
        return self.model

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        with naming("sum of the sharded gradients"):
            loss.backward()
            if last:
                hand_over_gradients(self.model)
                self._complete()

    def _complete(self) -> None:
        """SUM what is not divided; what no token reached has a gradient of zeros. Collective."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.mesh.size("stage") > 1:
            parts = ((p.grad, self.shards[name].along) for name, p in self.parameters.items())
            whole = [grad for grad, along in parts if grad is not None and along == "stage"]
            sum_in_buckets(whole, self.mesh.group("stage"))
