"""The routers against Hugging Face's own: same weights, same input, hence the same experts and weights.

Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and -V3, GPT-OSS, Switch; and whole sparse blocks with gradients.
"""

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock, OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock, Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from turnout.moe import MoE, MoEConfig, RouteContext
from turnout.moe.routing.registry import build_router

D, E, K, F, T = 32, 16, 4, 24, 300


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module):
    """Random weights and buffers, all alive."""
    for i, tensor in enumerate((*module.parameters(), *module.buffers())):
        tensor.data.copy_(draw(*tensor.shape, seed=i) * (0.3 if tensor.ndim > 1 else 0.1))
    return module.eval()


def ours(router, **settings):
    settings = {"top_k": K, "eval_capacity_factor": None, **settings}
    return MoEConfig(width=D, expert_width=F, num_experts=E, router=router, **settings)


def same_routing(theirs, cfg, *, ordered=True, names=(("weight", "weight"),)):
    """Route T tokens both ways; where theirs lists the experts in no order, ours stays best first."""
    fill(theirs)
    router = build_router(cfg).eval()
    state = {our: theirs.state_dict()[their] for our, their in names}
    router.load_state_dict(state)
    x_TD = draw(T, D, seed=9)
    logits_TE, weights_TK, ids_TK = theirs(x_TD)
    routing = router(x_TD, RouteContext())
    if not ordered:
        ids_TK, order_TK = ids_TK.sort(-1)
        our_ids_TK, our_order_TK = routing.ids_TK.sort(-1)
        assert torch.equal(our_ids_TK, ids_TK)
        torch.testing.assert_close(routing.weights_TK.gather(1, our_order_TK), weights_TK.gather(1, order_TK))
    else:
        assert torch.equal(routing.ids_TK, ids_TK)
        torch.testing.assert_close(routing.weights_TK, weights_TK)
    torch.testing.assert_close(routing.logits_TE, logits_TE)
    assert routing.counts_E.gt(0).all()  # every expert was compared


SIZES = {"hidden_size": D, "num_experts_per_tok": K, "moe_intermediate_size": F}


def test_mixtral():
    config = MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    same_routing(MixtralTopKRouter(config), ours("topk_softmax"))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("config", "router"),
    [
        (Qwen2MoeConfig, Qwen2MoeTopKRouter),
        (Qwen3MoeConfig, Qwen3MoeTopKRouter),
        (OlmoeConfig, OlmoeTopKRouter),
    ],
)
def test_qwen_and_olmoe(config, router, renormalize):
    theirs = router(config(**SIZES, num_experts=E, norm_topk_prob=renormalize))
    same_routing(theirs, ours("topk_softmax", renormalize=renormalize))


def test_gpt_oss():
    theirs = GptOssTopKRouter(GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K))
    same_routing(theirs, ours("gpt_oss"), names=(("weight", "weight"), ("bias", "bias")))


@pytest.mark.parametrize(("groups", "top"), [(1, 1), (4, 2), (4, 4), (8, 2)])
def test_deepseek_v2(groups, top):
    method = "greedy" if groups == 1 else "group_limited_greedy"
    config = DeepseekV2Config(
        **SIZES, n_routed_experts=E, n_group=groups, topk_group=top, topk_method=method, routed_scaling_factor=16.0
    )
    cfg = ours("deepseek_v2", expert_groups=groups, top_groups=top, route_scale=16.0)
    same_routing(DeepseekV2TopkRouter(config), cfg, ordered=False)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("groups", "top"), [(1, 1), (4, 2), (8, 3)])
def test_deepseek_v3_with_a_bias(groups, top, renormalize):
    config = DeepseekV3Config(
        **SIZES, n_routed_experts=E, n_group=groups, topk_group=top, norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    cfg = ours("deepseek_v3", expert_groups=groups, top_groups=top, renormalize=renormalize, route_scale=2.5)
    theirs = fill(DeepseekV3TopkRouter(config))
    assert theirs.e_score_correction_bias.all()
    names = (("weight", "weight"), ("balance_bias", "e_score_correction_bias"))
    same_routing(theirs, cfg, ordered=False, names=names)


@pytest.mark.parametrize("slots", [T, 25])
def test_switch_with_and_without_dropping(slots):
    config = SwitchTransformersConfig(d_model=D, num_experts=E, expert_capacity=slots)
    theirs = fill(SwitchTransformersTop1Router(config))
    factor = None if slots == T else slots * E / T
    router = build_router(ours("switch", top_k=1, eval_capacity_factor=factor)).eval()
    router.load_state_dict({"weight": theirs.classifier.weight})
    x_TD = draw(T, D, seed=9)
    mask_1TE, probs_1T1, logits_1TE = theirs(x_TD[None])
    routing = router(x_TD, RouteContext())
    assert torch.equal(routing.kept_TK[:, 0], mask_1TE[0].sum(-1).bool())
    assert routing.kept_TK.all() == (slots == T)
    kept_T = routing.kept_TK[:, 0]
    assert torch.equal(routing.ids_TK[kept_T, 0], mask_1TE[0].argmax(-1)[kept_T])
    torch.testing.assert_close(routing.weights_TK, probs_1T1[0])
    torch.testing.assert_close(routing.logits_TE, logits_1TE[0])


def copied(block, cfg):
    """Our layer with the block's weights; its down projections are [D, F], its gate and up ours in one."""
    layer = MoE(cfg).eval()
    layer.router.weight.data = block.gate.weight.data
    layer.experts.w_in.data = block.experts.gate_up_proj.data
    layer.experts.w_out.data = block.experts.down_proj.data.transpose(1, 2).contiguous()
    if cfg.shared_experts:
        shared = block.shared_expert if cfg.shared_gate else block.shared_experts
        layer.shared.w_in.weight.data = torch.cat([shared.gate_proj.weight.data, shared.up_proj.weight.data])
        layer.shared.w_out.weight.data = shared.down_proj.weight.data
    if cfg.shared_gate:
        layer.shared_gate.weight.data = block.shared_expert_gate.weight.data
    return layer


def same_block(block, cfg):
    """The output and the gradients of input, router and experts."""
    theirs = fill(block)
    layer = copied(theirs, cfg)
    if cfg.router == "deepseek_v3":
        layer.router.balance_bias.copy_(theirs.gate.e_score_correction_bias)
    ours_x, theirs_x = (draw(T, D, seed=9).requires_grad_() for _ in range(2))
    ours_y, theirs_y = layer(ours_x)[0], theirs(theirs_x[None])[0]
    torch.testing.assert_close(ours_y, theirs_y)
    for y_TD in (ours_y, theirs_y):
        (y_TD * draw(T, D, seed=8)).sum().backward()
    torch.testing.assert_close(ours_x.grad / cfg.route_scale, theirs_x.grad / cfg.route_scale)
    torch.testing.assert_close(layer.router.weight.grad, theirs.gate.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.experts.w_in.grad, theirs.experts.gate_up_proj.grad, rtol=1e-4, atol=1e-4)


def test_mixtral_block():
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    same_block(MixtralSparseMoeBlock(config), ours("topk_softmax"))


@pytest.mark.parametrize("renormalize", [True, False])
def test_qwen2_block_with_its_gated_shared_expert(renormalize):
    config = Qwen2MoeConfig(**SIZES, num_experts=E, shared_expert_intermediate_size=40, norm_topk_prob=renormalize)
    cfg = ours("topk_softmax", renormalize=renormalize, shared_experts=1, shared_width=40, shared_gate=True)
    same_block(Qwen2MoeSparseMoeBlock(config), cfg)


def test_qwen3_block():
    config = Qwen3MoeConfig(**SIZES, num_experts=E, norm_topk_prob=True)
    same_block(Qwen3MoeSparseMoeBlock(config), ours("topk_softmax"))


def test_olmoe_block():
    config = OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K)
    assert not config.norm_topk_prob
    same_block(OlmoeSparseMoeBlock(config), ours("topk_softmax", renormalize=False))


DEEPSEEK = {**SIZES, "n_routed_experts": E, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
GROUPED = {"expert_groups": 4, "top_groups": 2, "shared_experts": 2}


def test_deepseek_v2_block():
    config = DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy", routed_scaling_factor=16.0)
    same_block(DeepseekV2Moe(config), ours("deepseek_v2", **GROUPED, route_scale=16.0))


def test_deepseek_v3_block():
    config = DeepseekV3Config(**DEEPSEEK, routed_scaling_factor=2.5)
    same_block(DeepseekV3MoE(config), ours("deepseek_v3", **GROUPED, route_scale=2.5))
