"""Sparse upcycling: at the start the logits are the dense model's, and the tokens are spread."""

import dataclasses

import pytest
import torch

from turnout import CheckpointError, ConfigError
from turnout.configs.typed import build, to_dict
from turnout.moe.config import ModelConfig
from turnout.moe.families.reading import open_source, whole_shapes
from turnout.moe.families.upcycle import Upcycled
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.store import load_model, save_model
from turnout.moe.upcycle_config import UpcycleConfig
from turnout.tests.helpers.llama import llama

TOKENS = 64


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("dense") / "llama")


def upcycled(path, how: UpcycleConfig) -> Decoder:
    with open_source(path) as source:
        sparse = Upcycled(source, how)
        model = Decoder(sparse.cfg).requires_grad_(False)
        model.load_state_dict({name: sparse.read(name) for name in whole_shapes(sparse.cfg)})
    return model.eval()


def logits(model: Decoder) -> tuple[torch.Tensor, dict]:
    ids = torch.randint(0, model.cfg.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(1))
    ctx = VarlenContext(torch.tensor([0, TOKENS], dtype=torch.int32))
    with torch.no_grad():
        return model(ids, torch.arange(TOKENS), ctx), ctx.routings


CASES = [
    UpcycleConfig(num_experts=4, router="switch"),
    UpcycleConfig(num_experts=4, top_k=2, every=1),
    UpcycleConfig(num_experts=8, top_k=3, sparse_layers=(0, 3)),
    UpcycleConfig(num_experts=4, top_k=2, granularity=2),
    UpcycleConfig(num_experts=8, granularity=2, first_dense=2, every=1),
    UpcycleConfig(num_experts=16, granularity=4, every=1),
    UpcycleConfig(num_experts=8, top_k=4, granularity=4, every=1),
]


@pytest.mark.parametrize("how", CASES, ids=lambda how: f"{how.router}-{how.num_experts}-{how.chosen}-{how.granularity}")
def test_the_logits_are_the_dense_model_s_and_the_tokens_are_spread(dense, how):
    theirs, _ = logits(load_model(dense))
    model = upcycled(dense, how)
    ours, routings = logits(model)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    assert tuple(routings) == model.cfg.moe_layers
    for routing in routings.values():
        groups = (routing.ids_TK // how.granularity).sort(-1).values
        shards = (routing.ids_TK % how.granularity).sort(-1).values
        often = how.chosen // how.granularity
        assert torch.equal(shards, torch.arange(how.granularity).repeat_interleave(often).expand_as(shards))
        assert torch.equal(groups[:, :: how.granularity], groups[:, how.granularity - 1 :: how.granularity])
        if how.chosen < how.num_experts:
            assert int(routing.counts_E.max()) < 0.95 * TOKENS
            assert int((routing.counts_E > 0).sum()) > how.chosen


def test_a_switch_gate_is_one_of_so_many(dense):
    _, routings = logits(upcycled(dense, UpcycleConfig(num_experts=4, router="switch")))
    for routing in routings.values():
        assert float((routing.weights_TK * 4 - 1).abs().max()) <= 1e-6


def test_an_expert_is_a_copy_of_its_shard(dense):
    how = UpcycleConfig(num_experts=4, top_k=2, granularity=2, every=4)
    whole, model = load_model(dense).blocks[3].ffn, upcycled(dense, how).blocks[3].ffn
    for e in range(4):
        units = torch.arange(24) + 24 * (e % 2)
        assert torch.equal(model.experts.w_in[e], whole.w_in.weight[torch.cat([units, 48 + units])])
        assert torch.equal(model.experts.w_out[e], 2 * whole.w_out.weight[:, units].T)
    assert torch.equal(model.router.weight[0], model.router.weight[1])
    assert not torch.equal(model.router.weight[0], model.router.weight[2])


def test_noise_makes_experts_differ_by_its_share_and_its_seed(dense):
    how = UpcycleConfig(num_experts=4, top_k=2, noise=0.1)
    plain = upcycled(dense, dataclasses.replace(how, noise=0.0)).blocks[1].ffn.experts.w_in
    noisy = upcycled(dense, how).blocks[1].ffn.experts.w_in
    for e in range(4):
        assert float((noisy[e] - plain[e]).std() / plain[e].std()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.equal(noisy, upcycled(dense, how).blocks[1].ffn.experts.w_in)
    assert not torch.equal(noisy, upcycled(dense, dataclasses.replace(how, seed=1)).blocks[1].ffn.experts.w_in)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_networks_without_a_gate_are_cut_too(dense, tmp_path, activation):
    cfg = dataclasses.replace(load_model(dense).cfg, activation=activation, tie_embeddings=False)
    model = Decoder(cfg).eval()
    save_model(tmp_path / "own", cfg, model.state_dict())
    ours, _ = logits(upcycled(tmp_path / "own", UpcycleConfig(num_experts=8, granularity=4, every=1)))
    torch.testing.assert_close(ours, logits(model)[0], rtol=0, atol=1e-5)


SETTINGS = [
    ({"num_experts": 6, "granularity": 4}, "upcycle.num_experts (6) must be a multiple of upcycle.granularity (4)"),
    ({"num_experts": 8, "granularity": 4, "top_k": 6}, "upcycle.top_k (6) must be a multiple of upcycle.granularity"),
    ({"num_experts": 8, "router": "switch", "top_k": 2}, "upcycle.top_k (2) must be 1 for upcycle.router=switch"),
    ({"num_experts": 8, "router": "switch", "granularity": 2}, "upcycle.granularity (2) gives a token one shard"),
    ({"num_experts": 8, "top_k": 1}, "upcycle.top_k (1) gives every token the weight 1"),
    ({"num_experts": 2, "top_k": 4}, "upcycle.top_k (4) can not exceed upcycle.num_experts (2)"),
    ({"num_experts": 1}, "upcycle.num_experts (1) must be at least 2"),
    ({"top_k": 2}, "upcycle.top_k (2) needs upcycle.num_experts"),
    ({"num_experts": 8, "noise": 1.0}, "upcycle.noise (1.0) must lie in [0, 1)"),
    ({"num_experts": 8, "router": "hash"}, "upcycle.router ('hash') must be"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=lambda value: str(value)[:40])
def test_settings_that_can_not_be_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        build(UpcycleConfig, settings, "upcycle")
    assert str(caught.value).startswith(message)


def test_models_that_can_not_be_cut_are_refused(dense):
    how, cfg = UpcycleConfig(num_experts=8), load_model(dense).cfg
    with pytest.raises(ConfigError, match=r"model\.moe \(set\) is in the model already"):
        how.sparse(how.sparse(cfg))
    with pytest.raises(ConfigError, match=r"upcycle\.granularity \(5\) must divide model\.ffn_width \(48\)"):
        UpcycleConfig(num_experts=10, granularity=5).sparse(cfg)
    encoder = build(ModelConfig, {**to_dict(cfg), "encoder": {"layers": 1}})
    with pytest.raises(ConfigError, match=r"model\.encoder \(set\)"):
        how.sparse(encoder)
    with pytest.raises(ConfigError, match=r"moe\.sparse_layers \(9\) must lie below"):
        UpcycleConfig(num_experts=8, sparse_layers=(9,)).sparse(cfg)


def test_a_source_names_what_does_not_fit(dense, tmp_path):
    cfg = load_model(dense).cfg
    model = Decoder(cfg)
    save_model(tmp_path / "own", cfg, model.state_dict())
    file = tmp_path / "own" / "config.json"
    file.write_text(file.read_text().replace('"ffn_width": 48', '"ffn_width": 40'))
    with (
        pytest.raises(CheckpointError, match=r"ffn.w_in.weight \[96, 32\] .* must have shape \[80, 32\]"),
        open_source(tmp_path / "own"),
    ):
        pass
    (tmp_path / "own" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="does not read as safetensors"), open_source(tmp_path / "own"):
        pass
