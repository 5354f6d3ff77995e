"""What every optimizer here derives from: making one does not import a compiler (130 MB, a second)."""

import inspect
from typing import Any

from torch import optim


class PlainOptimizer(optim.Optimizer):
    """PyTorch's `Optimizer`, but for what imports its compiler as soon as there are parameters."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(optim.Optimizer.add_param_group)(self, param_group)
