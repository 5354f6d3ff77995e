"""SmoothQuant's scales: the block computes what it computed, its router chooses alike, and its rows are easier."""

from dataclasses import replace

import pytest
import torch

from turnout.moe import ModelConfig, MoEConfig, VarlenContext
from turnout.moe.attention_config import AttentionConfig, LatentConfig
from turnout.moe.compress.smooth import smooth
from turnout.moe.compress.watch import watching
from turnout.moe.layers.block import Block
from turnout.moe.routing.record import RouteContext

DENSE = ModelConfig(vocab_size=50, width=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn_width=24, max_seq_len=64)
TOKENS = 40


def sparse(**moe):
    given = {"num_experts": 4, "expert_width": 16, "router": "gshard", "top_k": 2} | moe
    return replace(DENSE, moe=MoEConfig(width=32, every=1, **given))


def latent(rank):
    return AttentionConfig(latent=LatentConfig(rank=16, rope_dim=4, value_dim=6, query_rank=rank))


MODELS = {
    "dense": DENSE,
    "relu": replace(DENSE, activation="relu"),
    "gelu": replace(DENSE, activation="gelu", attention=AttentionConfig(clip=1.0)),
    "biases": replace(DENSE, attention=AttentionConfig(qkv_bias=True, output_bias=True, qk_norm="head")),
    "latent": replace(DENSE, kv_heads=4, attention=latent(12)),
    "latent, whole queries": replace(DENSE, kv_heads=4, attention=latent(None)),
    "gshard": sparse(),
    "shared": sparse(shared_experts=1, shared_gate=True),
    "noisy": sparse(router="noisy_topk"),
    "gpt_oss": sparse(router="gpt_oss", bias=True, activation="relu"),
    "hash": sparse(router="hash", top_k=1),
    "deepseek_v3": sparse(router="deepseek_v3", shared_experts=1),
}


def block_of(cfg, dtype=torch.float64):
    torch.manual_seed(0)
    block = Block(cfg, 0).to(dtype).eval().requires_grad_(False)
    for parameter in block.parameters():  # biases and norms too are those of a model that has learned
        parameter.add_(torch.randn_like(parameter) * 0.1)
    block.ffn_norm.weight[3] = block.attention_norm.weight[5] = 40.0
    return block


def run(block, x):
    route = RouteContext(token_ids_T=torch.arange(TOKENS) % 7)
    ctx = VarlenContext(torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32), route)
    y = block(x, torch.arange(TOKENS), ctx)
    return y, ctx.routings.get(0)


def met_of(block, x, gram=False):
    with watching(block, gram) as met:
        run(block, x)
    return met


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_the_block_computes_what_it_computed_bit_for_bit(name, alpha):
    block, x = block_of(MODELS[name]), torch.randn(TOKENS, 32, dtype=torch.float64)
    before, chosen = run(block, x)
    moved = smooth(block, met_of(block, x), alpha)
    after, again = run(block, x)
    assert {"attention_norm", "ffn_norm"} <= set(moved)
    assert any((s != 1).any() for s in moved.values())
    assert torch.equal(after, before), "powers of two round nothing"
    if chosen is not None:
        assert torch.equal(chosen.ids_TK, again.ids_TK)
        assert torch.equal(chosen.weights_TK, again.weights_TK)


@pytest.mark.parametrize("name", ["dense", "shared"])
def test_weights_of_half_precision_lose_no_bit_either(name):
    block, x = block_of(MODELS[name], torch.bfloat16), torch.randn(TOKENS, 32).bfloat16()
    before, _ = run(block, x)
    smooth(block, met_of(block, x), 0.5)
    assert torch.equal(run(block, x)[0], before)


def test_everything_that_is_linear_takes_part():
    dense = {"attention_norm", "attention.wv", "ffn_norm", "ffn.w_in"}
    experts = {f"ffn.experts.w_in[{e}]" for e in range(4)}
    expected = {
        "dense": dense,
        "relu": dense,
        "gelu": {"attention_norm", "ffn_norm"},
        "latent": {"attention_norm", "attention.q_norm", "attention.wkv", "ffn_norm", "ffn.w_in"},
        "shared": {"attention_norm", "attention.wv", "ffn_norm", "ffn.shared.w_in"} | experts,
    }
    for name, folds in expected.items():
        block = block_of(MODELS[name])
        met = met_of(block, torch.randn(TOKENS, 32, dtype=torch.float64))
        assert set(smooth(block, met, 0.5)) == folds, name


def test_scales_are_the_papers_as_powers_of_two():
    block, x = block_of(DENSE), torch.randn(TOKENS, 32, dtype=torch.float64)
    met = met_of(block, x)
    peak, most = met["ffn.w_in"][0].peak_D.clone(), block.ffn.w_in.weight.abs().amax(0)
    s = smooth(block, met, 0.7)["ffn_norm"]
    exact = peak**0.7 / most**0.3
    assert torch.equal(s.log2(), s.log2().round())
    assert ((s / exact).log2().abs() <= 0.5 + 1e-5).all()
    assert s[3] == s.max(), "the loud channel gives most"


def test_what_is_met_from_now_on_is_known_without_another_look():
    block, x = block_of(MODELS["shared"]), torch.randn(TOKENS, 32, dtype=torch.float64)
    met = met_of(block, x, gram=True)
    smooth(block, met, 0.5)
    for name, fresh in met_of(block, x, gram=True).items():
        for ours, theirs in zip(met[name], fresh, strict=True):
            assert ours.count == theirs.count
            for field in ("peak_D", "square_D", "gram_DD"):
                torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-5, atol=1e-5)


def test_values_that_several_heads_read_share_their_scale():
    block, x = block_of(DENSE), torch.randn(TOKENS, 32, dtype=torch.float64)
    met = met_of(block, x)
    peak = met["attention.wo"][0].peak_D.view(2, 2, 8).amax(1)
    most = block.attention.wo.weight.abs().amax(0).view(2, 2, 8).amax(1)
    s = smooth(block, met, 0.5)["attention.wv"]
    assert s.shape == (16,)
    assert ((s.view(2, 8) / (peak / most).sqrt()).log2().abs() <= 0.5 + 1e-5).all()


def test_an_expert_that_met_nothing_keeps_its_weights():
    block, x = block_of(sparse(router="gpt_oss")), torch.randn(TOKENS, 32, dtype=torch.float64)
    block.ffn.router.bias[2] = -100.0
    met = met_of(block, x)
    idle = [e for e, seen in enumerate(met["ffn.experts.w_out"]) if not seen.count]
    assert idle == [2]
    kept = block.ffn.experts.w_out.clone()
    moved = smooth(block, met, 0.5)
    assert all(f"ffn.experts.w_in[{e}]" not in moved for e in idle)
    assert torch.equal(block.ffn.experts.w_out[idle], kept[idle])


def test_channels_that_are_always_zero_stay_as_they_are():
    block = block_of(DENSE)
    block.ffn_norm.weight[7] = 0
    s = smooth(block, met_of(block, torch.randn(TOKENS, 32, dtype=torch.float64)), 0.5)["ffn_norm"]
    assert s[7] == 1
    assert all(parameter.isfinite().all() for parameter in block.parameters())


def test_without_calibration_nothing_moves():
    block = block_of(DENSE)
    before = [parameter.clone() for parameter in block.parameters()]
    assert smooth(block, {}, 0.5) == {}
    assert all(torch.equal(old, new) for old, new in zip(before, block.parameters(), strict=True))
