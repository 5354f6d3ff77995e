"""torch.compile of every block's training pass (`train.compile`): fewer and larger kernels, results within rounding.

Compiled are the parts of a block whose tensors have one size all through a run: norms, projections, rotations, dense
and shared feed-forward networks. Attention over packed sequences, routing and experts run between them as they always
do, and so does evaluation, whose sequences have every length. A block is compiled as soon as it is first used; what can
not be compiled is an error and never quietly left.

This file imports the compiler, which takes as long as importing torch: import it when somebody compiles.

T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import calculate_time_spent
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from ... import ConfigError
from ..layers.block import Block
from ..layers.context import AttentionSpec, Context, Heads, Latent, Turns
from ..models.decoder import Decoder
from ..routing.record import Routing

OFF = "use train.compile=false"


def compile_blocks(model: Decoder, backend: str = "inductor") -> None:
    """Compile the blocks of `model`, in place. Before `recompute`, which then computes compiled blocks again.

    Raises:
        ConfigError: there is no C++ compiler, or torch is too old.
    """
    if "isolate_recompiles" not in signature(torch.compile).parameters:
        raise ConfigError(f"train.compile (true) needs torch 2.13, this is {torch.__version__}: install it, or {OFF}")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(f"train.compile (true) needs a C++ compiler: install g++, or {OFF}") from error
    for block in (module for module in model.blocks.children() if isinstance(module, Block)):
        setattr(block, "compute", _compiled(block, backend))  # noqa: B010 (a method is replaced)


def compile_seconds() -> float:
    """Time that this process has spent compiling."""
    return calculate_time_spent()["total_wall_time"]


class _Uncompiled:
    """A context for compiled code: its attention is left alone, and its loss scale is no constant."""

    def __init__(self, ctx: Context) -> None:
        self.route = replace(ctx.route, loss_scale=torch.as_tensor(ctx.route.loss_scale))
        self.turns: Turns = {}
        self._ctx = ctx

    @torch.compiler.disable
    def attend(
        self,
        spec: AttentionSpec,
        q_THd: Tensor,
        kv: Heads | Latent,
        sinks_H: Tensor | None = None,
        bias_HR: Tensor | None = None,
    ) -> Tensor:
        return self._ctx.attend(spec, q_THd, kv, sinks_H, bias_HR)


def _compiled(block: Block, backend: str) -> Callable[..., Any]:
    """`block.compute`, compiled in training.

    One graph for one size, and no block's graphs tried for another: a recomputation then takes the very graph that the
    forward pass took.
    """
    eager = block.compute
    settings: Any = {"backend": backend, "dynamic": False, "isolate_recompiles": True}
    fast = torch.compile(eager, **settings)

    def compute(x_TD: Tensor, positions_T: Tensor, ctx: Context) -> tuple[Tensor, Routing | None]:
        if not block.training:
            return eager(x_TD, positions_T, ctx)
        try:
            with dynamo.patch(fail_on_recompile_limit_hit=True):
                return fast(x_TD, positions_T, cast(Context, _Uncompiled(ctx)))
        except (FailOnRecompileLimitHit, TorchDynamoException) as error:
            limit = f"its inputs have more than {dynamo.recompile_limit} sizes"
            first = " ".join(str(error).split("\n\n")[0].split())
            reason = limit if isinstance(error, FailOnRecompileLimitHit) else first
            raise ConfigError(f"train.compile (true) failed in block {block.layer} ({reason}): {OFF}") from error

    return compute
