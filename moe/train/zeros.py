"""Zeros that stay: `train.keep_zeros` trains a pruned model on without filling what pruning made zero.

    g ← g · [w ≠ 0]     w ← w - lr · u · [w ≠ 0]     (Han et al. 1506.02626, section 3; u the optimizer's update)

Nothing is stored: what is zero before a step is zero after it, so a resumed run keeps the same weights and n:m patterns
stay whole. The gradient is masked before its norm is taken. An update that is made of a weight's own gradients alone
(AdamW, Adafactor) is then zero as well; Muon's is not, which masks it.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ... import ConfigError
from ...parallel import process
from ...parallel.fsdp import own_parameters
from ...parallel.mesh import Mesh
from ...parallel.shard import ShardSpec
from ..shapes import is_hidden_matrix
from .distill import LENT


def kept(model: nn.Module) -> frozenset[str]:
    """Names of the parameters whose zeros stay: the matrices of blocks, without routers."""
    found = own_parameters(model).items()
    return frozenset(name for name, weight in found if is_hidden_matrix(name, weight.ndim) and name not in LENT)


def count_zeros(model: nn.Module, shards: Mapping[str, ShardSpec], mesh: Mesh, init: str | None) -> tuple[int, int]:
    """(zeros, numbers) of what `kept` names, in the whole model. Collective.

    Args:
        init: the model whose weights these are, for the error.

    Raises:
        ConfigError: there are no zeros to keep.
    """
    parameters, sums = own_parameters(model), torch.zeros(2, dtype=torch.float64)
    for name in kept(model):
        weight, replicas = parameters[name], mesh.size(shards[name].along)
        numbers = torch.tensor([weight.numel() - int(weight.count_nonzero()), weight.numel()])
        sums += numbers / replicas
    zeros, numbers = (round(some) for some in process.all_sum(sums.to(mesh.device), "count of zeros").tolist())
    if not zeros:
        raise ConfigError(
            f"train.keep_zeros (true) finds no zeros in the blocks' matrices of train.init ({init}): prune it with "
            "turnout compress method=sparsegpt, or use train.keep_zeros=false"
        )
    return zeros, numbers
