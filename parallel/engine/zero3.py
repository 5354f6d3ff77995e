"""ZeRO-3 through DeepSpeed: weights, gradients and optimizer states of every parameter in one flat piece a rank.

    engine = Zero3Engine(model, optimizers, mesh, shards, units=model.blocks)

A block is gathered as one, when it computes and again for its backward pass; embedding, last norm and head by
themselves. Gradients are summed over the ranks after every micro-batch, so that a rank never keeps more than its piece.

DeepSpeed can only average gradients here. The pieces are multiplied by the number of ranks before anything reads them:
exact where that is a power of two, else within a rounding. The pieces at a parameter's end are padded with zeros.

Pieces are cut as if every rank held the same parameters, so experts can not be spread (`parallel.ep`).
"""

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ... import ConfigError
from ..mesh import Mesh
from ..process import naming
from ..shard import ShardSpec
from .deepspeed import ZeroEngine, check_trainable, initialize, part_of, settings


class Zero3Engine(ZeroEngine):
    """Trains `model` with ZeRO-3; otherwise as `DeepSpeedEngine`. Needs at least 2 ranks.

    Between steps parameters are empty tensors, whole only inside `whole()`; evaluate through `infer`.

    Args:
        units: the blocks of `model`, each gathered as one.

    Raises:
        ConfigError: as `DeepSpeedEngine`, or the experts are spread.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        mesh: Mesh,
        shards: Mapping[str, ShardSpec],
        *,
        units: Iterable[nn.Module],
        clip: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_trainable(model, optimizers, mesh, dtype)
        if mesh.ep_size > 1:
            raise ConfigError(
                f"parallel.zero (3) cuts what every rank holds, and parallel.ep ({mesh.ep_size}) gives ranks experts "
                "of their own: use parallel.zero=2, or engine=native parallel.fsdp=true"
            )
        self.model, self.optimizers, self.mesh, self.clip = model, list(optimizers), mesh, clip
        self.dtype, self.shards, self.parameters = dtype, shards, dict(model.named_parameters())
        self._parts = [part_of(self.optimizers[0], list(self.parameters.values()))]
        for unit in units:
            importlib.import_module("deepspeed.utils").set_z3_leaf_module(unit, True)
        self._engine = initialize(model, self._parts[0], mesh, (), settings(3, dtype))
        self._zero = self._engine.optimizer
        self._pieces: list[Tensor] = []

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        with naming("sum of the gradients' pieces"):
            self._engine.backward(loss, scale_wrt_gas=False)
        if last:
            self._pieces = [piece for pieces in self._zero.averaged_gradients.values() for piece in pieces]
            for piece in self._pieces:
                piece.mul_(self.mesh.world)

    def infer(self, *args: Any) -> Tensor | None:
        output: Tensor = self.forward(*args)
        return output

    def _owned_gradients(self) -> Iterator[tuple[Tensor, int]]:
        return ((piece, 1) for piece in self._pieces)

    def _forget_gradients(self) -> None:
        self._zero.averaged_gradients = {}
        self._zero.zero_grad()

    @contextmanager
    def whole(self) -> Iterator[None]:
        parameters: list[Any] = list(self.parameters.values())  # with DeepSpeed's methods
        with naming("gathering of ZeRO's parameters"):
            self._zero._partition_all_parameters()
            parameters[0].all_gather(param_list=parameters)
        try:
            yield
        finally:
            parameters[0].partition(param_list=parameters, has_been_updated=True)
            self._zero.refresh_fp32_params()
            self.optimizers[0].state.clear()

    def gather_state(self) -> None:
        """Fill `optimizers[0].state`, which `whole` empties at its end. Collective, inside `whole`."""
        get = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        flat, states = next(iter(self._parts[0].state.items()))
        divided = [key for key, value in states.items() if value.shape == flat.shape]
        with naming("gathering of ZeRO's states"):
            for parameter in self.parameters.values():
                self.optimizers[0].state[parameter] = {
                    key: get(parameter, key) if key in divided else value.clone() for key, value in states.items()
                }

    def scatter_state(self) -> None:
        """Take over `optimizers[0].state`, inside `whole`. Every rank keeps its pieces."""
        put = importlib.import_module("deepspeed.utils").safe_set_local_optimizer_state
        state, part = self.optimizers[0].state, self._parts[0]
        first, example = next(iter(state.items()))
        divided = [key for key, value in example.items() if value.shape == first.shape]
        for flat in self._zero.fp32_partitioned_groups_flat:
            part.state[flat] = {
                key: torch.zeros_like(flat) if key in divided else value.clone() for key, value in example.items()
            }
        for parameter in self.parameters.values():
            for key in divided:
                put(parameter, self._piece(state[parameter][key]), key)

    def _piece(self, whole: Tensor) -> Tensor:
        """This rank's flat piece of a tensor, padded as DeepSpeed pads it."""
        size = math.ceil(whole.numel() / self.mesh.world)
        mine = whole.flatten()[self.mesh.rank * size : (self.mesh.rank + 1) * size]
        return torch.cat([mine, mine.new_zeros(size - mine.numel())])
