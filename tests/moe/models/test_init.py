"""Initial weights depend on seed, name and expert, on nothing else."""

import pytest
import torch

from turnout.moe import Decoder
from turnout.moe.models.init import init_weights
from turnout.moe.routing.registry import ROUTERS


def parameters(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_same_seed_same_weights_and_other_seed_other_weights(make_config):
    first, again, other = (Decoder(make_config()) for _ in range(3))
    torch.manual_seed(1)
    init_weights(first, 7)
    torch.manual_seed(2)
    init_weights(again, 7)
    init_weights(other, 8)
    for name, weight in parameters(first).items():
        assert torch.equal(weight, parameters(again)[name])
        assert weight.ndim == 1 or not torch.equal(weight, parameters(other)[name])


def test_every_expert_starts_differently(make_model):
    weight = parameters(make_model())["blocks.1.ffn.experts.w_in"]
    assert len({tuple(expert.flatten()[:5].tolist()) for expert in weight}) == len(weight)
    assert not torch.equal(weight, parameters(make_model())["blocks.3.ffn.experts.w_in"])


@pytest.mark.parametrize("first", [0, 2])
def test_an_expert_parallel_rank_draws_its_slice_of_the_whole(make_config, make_model, first):
    whole = parameters(make_model())
    part = Decoder(make_config())
    for module in part.modules():
        if hasattr(module, "experts"):
            module.experts.first = first
            for name in ("w_in", "w_out"):
                weight = getattr(module.experts, name)
                setattr(module.experts, name, torch.nn.Parameter(weight[first : first + 2].clone()))
    init_weights(part, 0)
    for name, weight in parameters(part).items():
        expected = whole[name][first : first + 2] if ".experts." in name else whole[name]
        assert torch.equal(weight, expected), name


def test_scale_is_that_of_the_switch_paper(make_model):
    weights = parameters(make_model({"init_scale": 0.1, "expert_width": 64, "num_experts": 8}, vocab_size=2000))
    fan_in = {"embed.weight": 24, "blocks.1.ffn.experts.w_in": 24, "blocks.1.ffn.experts.w_out": 64}
    for name, width in (fan_in | {"blocks.0.ffn.w_out.weight": 32, "blocks.1.ffn.router.weight": 24}).items():
        sigma = (0.1 / width) ** 0.5
        assert weights[name].abs().max() <= 2 * sigma, name
        assert weights[name].std().item() == pytest.approx(0.88 * sigma, rel=0.15), name
    assert (weights["norm.weight"] == 1).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_and_the_shared_gate_are_drawn(make_config, make_model, router):
    changes = {"router": router, "top_k": None, "shared_experts": 1, "shared_gate": True, "noncausal": True}
    model, blank = make_model(changes), Decoder(make_config(changes))
    for tensor in [*blank.parameters(), *blank.buffers()]:
        tensor.data.fill_(torch.nan)
    init_weights(blank, 0)
    for (name, weight), again in zip(model.state_dict().items(), blank.state_dict().values(), strict=True):
        assert torch.equal(weight, again), name
    gate = model.state_dict()["blocks.1.ffn.shared_gate.weight"]
    assert gate.shape == (1, 24)
    assert 0 < gate.abs().max() <= 2 * (model.cfg.moe.init_scale / 24) ** 0.5
    for name, weight in model.blocks[1].ffn.router.named_parameters():
        starts_at_zero = model.blocks[1].ffn.router.variance(name) == 0
        assert starts_at_zero == (not weight.any()), name
