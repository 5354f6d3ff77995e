"""The layer in somebody's model under DDP and FSDP2: two ranks learn what one process learns from all the data.

T tokens, D width.
"""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from turnout.moe import MoE, MoEConfig, RouteContext
from turnout.parallel import ParallelConfig, build_mesh, parallelize, process
from turnout.tests.helpers.ranks import run_ranks

RANKS, STEPS, ROWS, LENGTH, WIDTH = 2, 3, 2, 12, 16
TOKENS = ROWS * LENGTH  # on each rank


class Model(nn.Module):
    """Somebody's: an embedding, two residual mixtures, a head."""

    def __init__(self, router: str, keep: bool = False, **changes) -> None:
        super().__init__()
        torch.manual_seed(0)
        cfg = MoEConfig(
            width=WIDTH, expert_width=8, num_experts=4, router=router, init_scale=2.0, capacity_factor=1.0,
            min_capacity=0, shared_experts=1, shared_gate=True, expert_dropout=0.1, jitter=0.05, **changes,
        )  # fmt: skip
        self.embed = nn.Embedding(32, WIDTH)
        self.mixtures = nn.ModuleList(MoE(cfg, layer) for layer in range(2))
        self.head = nn.Linear(WIDTH, 32)
        self.keep = keep

    def plan(self) -> dict[str, str]:
        return {"mixtures.*.experts.*": "expert"}

    def forward(self, tokens_T: torch.Tensor, context: RouteContext) -> torch.Tensor:
        x_TD = self.embed(tokens_T)
        for mixture in self.mixtures:
            y_TD, _ = checkpoint(mixture, x_TD, context, use_reentrant=False) if self.keep else mixture(x_TD, context)
            x_TD = x_TD + y_TD
        return self.head(x_TD)


def batch(step: int, first: int, count: int) -> tuple[torch.Tensor, RouteContext, torch.Tensor]:
    """Tokens, context and targets of `count` ranks from rank `first` on, of the step's global batch."""
    generator = torch.Generator().manual_seed(step)
    tokens_T, targets_T = torch.randint(0, 32, (2, RANKS * TOKENS), generator=generator).unbind()
    mine = slice(first * TOKENS, (first + count) * TOKENS)
    index_T = torch.arange(RANKS * TOKENS)[mine]
    starts = torch.arange(0, count * TOKENS + 1, LENGTH)
    return tokens_T[mine], RouteContext(cu_groups=starts, index_T=index_T, step=step, seed=4), targets_T[mine]


def train(model: nn.Module, first: int, count: int, change=lambda context: context) -> None:
    """Three steps of SGD, which would show a gradient of the wrong size, on the mean loss of the tokens at hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(STEPS):
        tokens_T, context, targets_T = batch(step, first, count)
        nn.functional.cross_entropy(model(tokens_T, change(context)), targets_T).backward()
        optimizer.step()
        optimizer.zero_grad()


def ddp(router: str, keep: bool, changes: dict) -> dict[str, torch.Tensor]:
    model = Model(router, keep, **changes)
    train(DistributedDataParallel(model), dist.get_rank(), 1)
    return model.state_dict()


def shard(model: Model, **options) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for mixture in model.mixtures:
        fully_shard(mixture.router, mesh=mesh)  # float32, whatever precision the rest has
        fully_shard(mixture, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() for name, tensor in model.state_dict().items() if hasattr(tensor, "full_tensor")}


def fsdp(router: str, keep: bool, changes: dict) -> dict[str, torch.Tensor]:
    model = Model(router, keep, **changes)
    shard(model)
    train(model, dist.get_rank(), 1)
    return whole(model)


def assert_learned_alike(found: list[dict], router: str, **changes) -> None:
    expected, start = Model(router, **changes), Model(router, **changes).state_dict()
    train(expected, 0, RANKS)
    for state in found:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    assert len(found[0]) == len(list(expected.parameters()))
    assert all((start[name] != p).any() for name, p in expected.named_parameters())


@pytest.mark.parametrize(
    ("router", "keep"),
    [
        pytest.param("switch", False, id="switch-kept"),
        pytest.param("gshard", True, id="gshard-recomputed"),
        pytest.param("topk_softmax", False, id="topk_softmax-kept"),
        pytest.param("switch", True, id="switch-recomputed", marks=pytest.mark.full),
        pytest.param("gshard", False, id="gshard-kept", marks=pytest.mark.full),
        pytest.param("topk_softmax", True, id="topk_softmax-recomputed", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("wrapper", [ddp, fsdp])
def test_two_ranks_learn_what_one_learns_from_all_the_data(wrapper, router, keep):
    assert_learned_alike(run_ranks(wrapper, RANKS, router, keep, {}), router)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def global_batch() -> dict[str, torch.Tensor]:
    """Losses over the global batch are parts to be summed; DDP averages, so each part grows by the world."""
    model = Model("switch", balance_over="global_batch", balance_loss=0.5)

    def change(context: RouteContext) -> RouteContext:
        tokens = RANKS * TOKENS
        return dataclasses.replace(context, total_tokens=tokens, loss_scale=float(RANKS), reducer=summed)

    train(DistributedDataParallel(model), dist.get_rank(), 1, change)
    return model.state_dict()


def test_balance_over_the_global_batch_under_an_averaging_wrapper():
    found = run_ranks(global_batch, RANKS)
    assert_learned_alike(found, "switch", balance_over="global_batch", balance_loss=0.5)


def mixed_precision() -> tuple[list, torch.Tensor, torch.Tensor]:
    """What a router under FSDP2's bfloat16 computes in, and what it would compute alone."""
    model = Model("gshard")
    router = copy.deepcopy(model.mixtures[0].router)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    seen = []
    model.mixtures[0].router.register_forward_hook(lambda module, inputs, routing: seen.append((inputs[0], routing)))
    tokens_T, context, targets_T = batch(0, dist.get_rank(), 1)
    nn.functional.cross_entropy(model(tokens_T, context).float(), targets_T).backward()
    x_TD, routing = seen[0]
    alone = router(x_TD.detach(), context)
    dtypes = [x_TD.dtype, routing.logits_TE.dtype, routing.weights_TK.dtype]
    return [str(d) for d in dtypes], routing.logits_TE.detach(), alone.logits_TE.detach()


def test_mixed_precision_of_fsdp_leaves_the_router_in_float32():
    for dtypes, logits_TE, alone_TE in run_ranks(mixed_precision, RANKS):
        assert dtypes == ["torch.bfloat16", "torch.float32", "torch.float32"]
        assert torch.equal(logits_TE, alone_TE)


def spread(router: str, keep: bool) -> dict[str, torch.Tensor]:
    """A step of the model whose experts lie on two ranks: this rank's logits and its experts' gradients."""
    model = Model(router, keep)
    if process.world() > 1:
        parallelize(model, build_mesh(ParallelConfig(ep=RANKS), num_experts=4))
    tokens_T, context, targets_T = batch(0, process.rank(), RANKS // process.world())
    logits_TV = model(tokens_T, dataclasses.replace(context, total_tokens=RANKS * TOKENS))
    nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum").backward()
    return {"logits": logits_TV.detach(), "w_in": model.mixtures[0].experts.w_in.grad}


@pytest.mark.parametrize("keep", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("router", ["gshard", "expert_choice"])
def test_experts_on_two_ranks_drop_the_units_that_one_rank_drops(router, keep):
    found, expected = run_ranks(spread, RANKS, router, keep), run_ranks(spread, 1, router, keep)[0]
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.cat([part[name] for part in found]), tensor, rtol=1e-4, atol=1e-5, msg=name)
