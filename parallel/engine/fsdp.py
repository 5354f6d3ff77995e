"""The FSDP2 engine: as `native`, for a model whose parameters `parallel.fsdp.divide` has divided."""

from torch import Tensor, nn

from ..fsdp import hand_over_gradients
from ..process import naming
from .native import NativeEngine
from .update import sum_replicas


class FsdpEngine(NativeEngine):
    """Trains a divided model: its own hooks gather parameters and scatter gradients, in every micro-batch.

    What is not divided (vectors, routers) is summed after the last one. Otherwise as `NativeEngine`.
    """

    def _replicate(self) -> nn.Module:
        return self.model

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        with naming("sum of the divided gradients"):
            loss.backward()
            if last:
                hand_over_gradients(self.model)
                sum_replicas(self.parameters, self.shards, self.mesh)
