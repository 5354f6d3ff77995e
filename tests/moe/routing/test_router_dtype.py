"""A router that scores in bfloat16, for comparison: its numbers are bfloat16's, the same in training and serving."""

import pytest
import torch

from turnout import ConfigError
from turnout.moe import Decoder, ModelConfig, MoEConfig, load_model, save_model
from turnout.moe.families.family import families
from turnout.tests.moe.layers.making import LEARNED, WIDTH, context, make

TOKENS = 40
NARROW = {"router_dtype": "bfloat16"}


@pytest.mark.parametrize("router", LEARNED)
def test_its_scores_are_bfloat16_numbers_near_the_exact_ones(router):
    x = torch.randn(TOKENS, WIDTH)
    (_, narrow), (_, exact) = (make(router, **changes)(x, context(TOKENS)) for changes in (NARROW, {}))
    for name in ("logits_TE", "probs_TE"):
        found, expected = getattr(narrow, name), getattr(exact, name)
        assert found.dtype == torch.float32
        assert torch.equal(found, found.bfloat16().float()), name
        assert 0 < (found - expected).norm() < 2e-2 * expected.norm()
    assert not torch.equal(exact.logits_TE, exact.logits_TE.bfloat16().float())


@pytest.mark.parametrize("router", LEARNED)
def test_it_learns_through_the_rounding(router):
    x, found = torch.randn(TOKENS, WIDTH), []
    for changes in (NARROW, {}):
        layer = make(router, **changes)
        y, routing = layer(x, context(TOKENS))
        y.square().sum().backward()
        found.append((layer.router.weight.grad, routing))
    (narrow, ours), (exact, theirs) = found
    assert narrow.dtype == torch.float32
    assert narrow.isfinite().all()
    alike = torch.equal(ours.ids_TK * ours.kept_TK, theirs.ids_TK * theirs.kept_TK)
    assert 0 < (narrow - exact).norm() < (0.1 if alike else 2) * exact.norm()  # a tipped choice has another gradient


@pytest.mark.parametrize("router", ["switch", "gshard", "topk_softmax", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_training_and_serving_choose_and_weigh_alike(router):
    """In training under autocast, in evaluation at either precision, and where no gradient is asked for."""
    second = {"second_policy": "all"} if router == "gshard" else {}  # else drawn in training only
    trained = make(router, capacity_factor=None, eval_capacity_factor=None, **second, **NARROW)
    x = torch.randn(TOKENS, WIDTH).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = trained(x, context(TOKENS))
    trained.eval()
    found = [trained(x, context(TOKENS))[1]]
    with torch.inference_mode():
        found += [trained(x, context(TOKENS, propagate_nan=True))[1]]
        found += [trained.bfloat16()(x.bfloat16(), context(TOKENS))[1]]
    for routing in found:
        assert torch.equal(routing.ids_TK, expected.ids_TK)
        assert torch.equal(routing.weights_TK, expected.weights_TK)


def test_float32_is_the_default_and_a_hash_has_nothing_to_round():
    assert MoEConfig(width=8, expert_width=8).router_dtype == "float32"
    with pytest.raises(ConfigError, match=r"moe\.router_dtype \(bfloat16\) rounds logits, which moe\.router=hash"):
        MoEConfig(width=8, expert_width=8, router="hash", router_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"moe\.router_dtype \('float16'\) must be one of"):
        MoEConfig(width=8, expert_width=8, router_dtype="float16")


def test_a_stored_model_keeps_it_and_no_family_drops_it_in_silence(tmp_path):
    moe = MoEConfig(width=16, expert_width=16, router="topk_softmax", every=1, eval_capacity_factor=None, **NARROW)
    cfg = ModelConfig(
        vocab_size=40, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_width=16, max_seq_len=32, moe=moe
    )
    model = Decoder(cfg)
    save_model(tmp_path / "model", cfg, dict(model.named_parameters()))
    assert load_model(tmp_path / "model").blocks[0].ffn.router.narrow
    for family in families():
        with pytest.raises(ConfigError):
            family.to_theirs(cfg, "float32")
    with pytest.raises(ConfigError, match=r"moe\.router_dtype \(bfloat16, there float32\)"):
        next(family for family in families() if family.name == "mixtral").to_theirs(cfg, "float32")
