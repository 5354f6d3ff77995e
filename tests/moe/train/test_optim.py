"""The optimizers: each parameter in exactly one, Muon orthogonal and independent of how matrices are batched."""

import pytest
import torch
from torch import nn

from turnout.launch.compose import compose
from turnout.moe.models.decoder import Decoder
from turnout.moe.train.adafactor import Adafactor
from turnout.moe.train.adamw import AdamW
from turnout.moe.train.config import OptimConfig
from turnout.moe.train.optim import Muon, build_optimizers, orthogonalize, set_rate


@pytest.fixture
def model():
    return Decoder(compose(["model=tiny", "nproc=1", "data.vocab_size=300"]).config.model)


def owners(model, cfg):
    names = {weight: name for name, weight in model.named_parameters()}
    found = {}
    for optimizer in build_optimizers(model, cfg):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                assert names[weight] not in found, "in two groups"
                found[names[weight]] = (type(optimizer), group["weight_decay"])
    assert found.keys() == set(names.values())
    return found


def test_muon_takes_hidden_matrices_and_experts_and_adamw_the_rest(model):
    found = owners(model, OptimConfig(name="muon", weight_decay=0.1))
    for name, (kind, decay) in found.items():
        hidden = any(part in name for part in ("attention.w", "ffn.w_", "experts.w_"))
        assert kind is (Muon if hidden else AdamW), name
        assert decay == (0.0 if "norm" in name or "router" in name else 0.1), name
    assert any("experts" in name for name in found)


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("adafactor", Adafactor)])
def test_adamw_and_adafactor_take_everything(model, name, kind):
    found = owners(model, OptimConfig(name=name, weight_decay=0.1))
    assert set(found.values()) == {(kind, 0.1), (kind, 0.0)}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 64), (2, 64, 16)], ids=str)
def test_newton_schulz_brings_all_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.4
    g_BRC = torch.randn(shape)
    u, _, vh = torch.linalg.svd(g_BRC, full_matrices=False)
    cosine = torch.cosine_similarity(orthogonalize(g_BRC).flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.9


def test_a_zero_gradient_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def test_muon_does_by_batches_what_it_does_one_matrix_at_a_time():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 16, 8))
    alone = [nn.Parameter(stack[e].detach().clone()) for e in range(3)]
    together = Muon([("experts.w_in", stack)], lr=0.1, weight_decay=0.5)
    singles = Muon([(f"{e}.w_in", weight) for e, weight in enumerate(alone)], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        stack.grad = torch.randn(3, 16, 8)
        for e, weight in enumerate(alone):
            weight.grad = stack.grad[e].clone()
        together.step()
        singles.step()
    torch.testing.assert_close(stack, torch.stack(alone), rtol=1e-2, atol=1e-2)


def test_muon_s_first_step_is_its_definition():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 8))
    before, grad = weight.detach().clone(), torch.randn(32, 8)
    weight.grad = grad
    Muon([("wq.weight", weight)], lr=0.1, momentum=0.9).step()
    update = orthogonalize((grad * (0.1 + 0.9 * 0.1)).bfloat16()[None])[0].float()
    torch.testing.assert_close(weight.detach(), before - 0.1 * 2.0 * update, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("name", "scale"), [("experts.w_in", 2.0), ("experts.w_out", 1.0)])
def test_the_scale_of_a_stack_follows_its_orientation(name, scale):
    optimizer = Muon([(name, nn.Parameter(torch.zeros(2, 32, 8)))], lr=0.1)
    assert optimizer.param_groups[0]["scale"] == scale


def test_state_is_float32_and_a_parameter_without_gradient_rests():
    weight, idle = nn.Parameter(torch.randn(4, 8).bfloat16()), nn.Parameter(torch.ones(4, 8))
    weight.grad = torch.randn(4, 8).bfloat16()
    optimizer = Muon([("a", weight), ("b", idle)], lr=0.1)
    optimizer.step()
    assert optimizer.state[weight]["momentum"].dtype == torch.float32
    assert torch.equal(idle, torch.ones(4, 8))


def test_every_group_follows_the_schedule(model):
    optimizers = build_optimizers(model, OptimConfig(name="muon", lr=0.004, muon_lr=0.02))
    set_rate(optimizers, 0.5)
    rates = {type(o): {group["lr"] for group in o.param_groups} for o in optimizers}
    assert rates == {AdamW: {0.002}, Muon: {0.01}}
