"""Moments in bfloat16: rounding that is right on average, the same on every layout, and half the bytes."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from turnout.kernels.random import ROUND, uniform
from turnout.launch.compose import compose
from turnout.moe.models.decoder import Decoder
from turnout.moe.train import moments
from turnout.moe.train.config import OptimConfig
from turnout.moe.train.moments import CompactAdamW, Rounding, round_stochastically
from turnout.moe.train.optim import build_optimizers
from turnout.parallel.shard import ShardSpec

STEP = 2.0**-7  # of bfloat16 between 1 and 2


def stack(weight: torch.Tensor, steps: int, shard: ShardSpec, beta2: float = 0.95, scale: float = 1.0):
    """A stack's weights and moments after steps on known gradients of the whole, of which it is the `shard`."""
    model = nn.Module()
    model.w = nn.Parameter(weight.clone())
    groups = [{"params": [model.w], "lr": 0.01, "weight_decay": 0.1}]
    optimizer = CompactAdamW(groups, (0.9, beta2), 1e-8, Rounding({"w": model.w}, {"w": shard}, seed=3))
    draws = torch.Generator().manual_seed(0)
    place = tuple(slice(begin, begin + size) for begin, size in zip(shard.offset, weight.shape, strict=True))
    for step in range(steps):
        grad = torch.randn(shard.global_shape, generator=draws) * scale**step
        model.w.grad = grad[place].clone()
        optimizer.step()
    return model.w.detach(), optimizer.state[model.w]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_quarter_of_the_way_is_rounded_up_in_a_quarter_of_the_draws(sign):
    x = torch.full((3,), sign * (1 + STEP / 4))
    assert (sign * round_stochastically(x, torch.tensor([0.0, 0.7499, 0.75]))).tolist() == [1, 1, 1 + STEP]


def test_what_bfloat16_has_stays():
    x = torch.cat([torch.randn(1000), torch.zeros(1), torch.tensor([1e-38, 3e38])]).bfloat16()
    assert torch.equal(round_stochastically(x.float(), torch.full(x.shape, 1 - 2.0**-24)), x)


def test_it_is_right_on_average():
    x = torch.full((100_000,), 1 + 0.3 * STEP)
    draws = uniform(0, torch.arange(100_000), step=1, layer=0, purpose=ROUND)[:, 0]
    assert abs(round_stochastically(x, draws).double().mean() - x[0]) < 0.01 * STEP


def test_a_slow_square_follows_its_gradients_where_rounding_to_nearest_would_stand_still():
    whole = ShardSpec((1, 32, 32), (0, 0, 0))
    _, state = stack(torch.zeros(1, 32, 32), 300, whole, beta2=0.999, scale=0.9)
    exact = nn.Parameter(torch.zeros(1, 32, 32))
    reference = AdamW([exact], betas=(0.9, 0.999))
    draws = torch.Generator().manual_seed(0)
    nearest = torch.zeros(1, 32, 32, dtype=torch.bfloat16)
    for step in range(300):
        exact.grad = torch.randn(1, 32, 32, generator=draws) * 0.9**step
        nearest = nearest.float().lerp(exact.grad.square(), 0.001).bfloat16()
        reference.step()
    true = reference.state[exact]["exp_avg_sq"].mean()
    assert abs(state["exp_avg_sq"].float().mean() / true - 1) < 0.01
    assert nearest.float().mean() / true > 1.2


def test_it_moves_as_torch_s_adamw_does():
    torch.manual_seed(0)
    start, whole = torch.randn(2, 16, 8), ShardSpec((2, 16, 8), (0, 0, 0))
    for steps, near in ((1, 1e-6), (50, 0.01)):
        exact = nn.Parameter(start.clone())
        reference, draws = (
            AdamW([exact], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
            torch.Generator().manual_seed(0),
        )
        for _ in range(steps):
            exact.grad = torch.randn(2, 16, 8, generator=draws)
            reference.step()
        moved, _ = stack(start, steps, whole)
        assert (moved - exact).norm() < near * (exact - start).norm()


def test_experts_round_alike_wherever_they_lie_and_however_many_at_a_time(monkeypatch):
    torch.manual_seed(0)
    start = torch.randn(4, 6, 8)
    whole, state = stack(start, 5, ShardSpec((4, 6, 8), (0, 0, 0)))
    monkeypatch.setattr(moments, "CHUNK", 50)
    for first in (0, 2):
        part, kept = stack(start[first : first + 2], 5, ShardSpec((4, 6, 8), (first, 0, 0)))
        assert torch.equal(part, whole[first : first + 2])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(kept[key], state[key][first : first + 2])


@pytest.mark.parametrize("place", [(slice(2, 5), slice(0, 8)), (slice(0, 6), slice(4, 8)), (slice(6, 6), slice(0, 8))])
def test_a_slice_of_a_matrix_rounds_as_the_whole_does(place):
    torch.manual_seed(0)
    start = torch.randn(6, 8)
    whole, state = stack(start, 5, ShardSpec((6, 8), (0, 0)))
    part, kept = stack(start[place], 5, ShardSpec((6, 8), (place[0].start, place[1].start)))
    assert torch.equal(part, whole[place])
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(kept[key], state[key][place])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_take_half_the_bytes(name):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        model = Decoder(compose(["model=tiny", "nproc=1", "data.vocab_size=300"]).config.model)
        optimizers = build_optimizers(model, OptimConfig(name=name, state_dtype=dtype))
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        for optimizer in optimizers:
            optimizer.step()
        states = [kept for optimizer in optimizers for kept in optimizer.state.values()]
        sizes[dtype] = sum(t.nbytes for kept in states for key, t in kept.items() if key != "step")
    assert 2 * sizes["bfloat16"] == sizes["float32"] > 0
