"""Sparse upcycling: the tensors of a sparse model from those of a dense one, one at a time.

The dense network y = W_out · act(W_in · x) is a sum over its hidden units, so it is the sum of G shards of F / G units
each. An expert is a copy of one shard; expert e = g · G + s holds shard s in virtual group g (2410.07524 §3.2). Right
after upcycling the model computes what the dense one did, because every token gets every shard with a weight of one:

    topk_softmax   the G experts of a group share one row of the router, so a group is chosen whole or not at all; the
                   renormalised weights of one shard's copies sum to 1 / G, and w_out is scaled by G. Exact for ANY
                   router, so its rows are drawn as for a new model and tokens spread from the first step on.
    switch         the gate is p = softmax(x · Wᵀ), which no scale can undo token by token. The router is so small that
                   p = 1 / E to 1e-6 and w_out is scaled by E, but not zero: its order of the logits still spreads the
                   tokens, where equal logits would all mean expert 0.

Without noise, that is, and without drops. E experts, G shards, D width, F hidden width of the dense network.
"""

import hashlib

import torch
from torch import Tensor, nn

from ..config import ModelConfig, MoEConfig
from ..layers.ffn import hidden_rows
from ..upcycle_config import UpcycleConfig
from .reading import Source

TINY = 1e-7  # σ of Switch's logits at the start, for inputs of mean square one


class Upcycled:
    """A dense source seen as a sparse one; every rank and every layout reads the same numbers.

    Raises:
        ConfigError: the dense model can not become what `how` says.
    """

    def __init__(self, dense: Source, how: UpcycleConfig) -> None:
        self.dense, self.how, self.cfg = dense, how, how.sparse(dense.cfg)
        self._sparse = {f"blocks.{layer}.ffn." for layer in self.cfg.moe_layers}

    def read(self, name: str) -> Tensor:
        """The whole tensor in float32, on the CPU."""
        path, ffn, leaf = name.partition(".ffn.")
        if path + ffn not in self._sparse:
            return self.dense.read(name)
        moe = self.cfg.moe
        assert moe is not None
        if leaf == "router.weight":
            return router(moe, self.how, name)
        whole = self.dense.read(f"{path}{ffn}{leaf.removeprefix('experts.')}.weight")
        return experts(whole, leaf, self.cfg, self.how, name)


@torch.no_grad()
def router(moe: MoEConfig, how: UpcycleConfig, name: str) -> Tensor:
    """Router weights [E, D]: one row a virtual group, repeated for its shards."""
    variance = TINY**2 / moe.width if how.router == "switch" else moe.init_scale / moe.width
    rows = torch.empty(moe.num_experts // how.granularity, moe.width)
    std = variance**0.5
    nn.init.trunc_normal_(rows, std=std, a=-2 * std, b=2 * std, generator=_generator(how, name))
    return rows.repeat_interleave(how.granularity, 0)


@torch.no_grad()
def experts(whole: Tensor, leaf: str, cfg: ModelConfig, how: UpcycleConfig, name: str) -> Tensor:
    """A stack of experts from the dense matrix.

    Args:
        whole: `w_in` [2F or F, D] or `w_out` [D, F] of the dense network.
        leaf: `experts.w_in` or `experts.w_out`.
        cfg: the sparse model.
        how: the upcycling.
        name: of the stack; it keys the noise.

    Returns:
        [E, 2F/G or F/G, D] or [E, F/G, D]; a SwiGLU's shards take the same rows of gate and up projection.
    """
    shards, hidden = how.granularity, cfg.ffn_width
    if leaf == "experts.w_in":
        parts = hidden_rows(cfg.activation, hidden) // hidden
        cut = whole.unflatten(0, (parts, shards, hidden // shards)).transpose(0, 1).flatten(1, 2)
    else:
        cut = whole.t().unflatten(0, (shards, hidden // shards)) * how.scale
    assert cfg.moe is not None
    stack = cut.repeat(cfg.moe.num_experts // shards, 1, 1)
    if how.noise:
        for number, matrix in enumerate(stack):
            std = how.noise * float(matrix.std())
            matrix.add_(torch.randn(matrix.shape, generator=_generator(how, f"{name}/{number}")), alpha=std)
    return stack


def _generator(how: UpcycleConfig, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"upcycle/{how.seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
