"""Latent attention: absorbed or expanded it is the same, and the same as in transformers, gradients included.

T tokens, D width.
"""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from turnout import ConfigError
from turnout.kernels import varlen_attention
from turnout.moe import ModelConfig, VarlenContext
from turnout.moe.attention_config import AttentionConfig, LatentConfig
from turnout.moe.families.deepseek import places
from turnout.moe.layers.latent import LatentAttention, absorb, release

TOKENS, WIDTH, BORDERS = 23, 24, (0, 9, 10, 23)


def config(query_rank: int | None = 10, window: int | None = None, **changes) -> ModelConfig:
    latent = LatentConfig(rank=8, rope_dim=4, value_dim=5, query_rank=query_rank)
    own = AttentionConfig(latent=latent, window=window, **changes)
    return ModelConfig(
        vocab_size=9, width=WIDTH, layers=1, heads=3, kv_heads=3, head_dim=6, ffn_width=8, max_seq_len=32, attention=own
    )


def layer(cfg: ModelConfig, dtype: torch.dtype) -> LatentAttention:
    torch.manual_seed(0)
    made = LatentAttention(cfg, 0).to(dtype)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, mean=weight.ndim == 1, std=0.3)
    return made


class AbsorbedContext(VarlenContext):
    """Every head reads the latents themselves."""

    def attend(self, spec, q_THd, kv, sinks_H=None, bias_HR=None):
        k_T1x = torch.cat((kv.c, kv.k_rope), -1)[:, None]
        o_THc = varlen_attention(
            absorb(q_THd, kv), k_T1x, kv.c[:, None], self.cu_seqlens_B1, scale=spec.scale, window=spec.window
        )
        return release(o_THc, kv)


def attended(made: LatentAttention, x_TD: Tensor, context: type[VarlenContext]) -> Tensor:
    borders = torch.tensor(BORDERS)
    positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(BORDERS)])
    return made(x_TD, positions, context(borders))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("query_rank", [10, None])
@pytest.mark.parametrize("window", [None, 4])
def test_absorbed_is_expanded_and_so_are_the_gradients(query_rank, window, dtype, bound):
    made = layer(config(query_rank, window), dtype)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    grad_TD = torch.randn(TOKENS, WIDTH, dtype=dtype)
    found, wanted = (
        (y := attended(made, x_TD, kind), *torch.autograd.grad(y, (x_TD, *made.parameters()), grad_TD))
        for kind in (AbsorbedContext, VarlenContext)
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= bound * other.norm()
        assert other.norm() > 0


PEERS = {"v2": (DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding),
         "v3": (DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding)}  # fmt: skip


@pytest.mark.parametrize("query_rank", [10, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("peer", PEERS)
def test_output_and_gradients_are_those_of_transformers(peer, bias, query_rank):
    make_config, make_layer, make_rotary = PEERS[peer]
    theirs_config = make_config(
        hidden_size=WIDTH, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=8, q_lora_rank=query_rank,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, attention_bias=bias, attn_implementation="eager",
    )  # fmt: skip
    cfg = config(query_rank, qkv_bias=bias, output_bias=bias)
    ours, theirs = layer(cfg, torch.float32), make_layer(theirs_config, 0)
    own = dict(ours.named_parameters())
    named = {
        place.theirs.partition("self_attn.")[2]: (place, place.ours.partition("attention.")[2])
        for place in places(cfg)
        if ".self_attn." in place.theirs
    }
    theirs.load_state_dict({name: place.take(own[ours_name]) for name, (place, ours_name) in named.items()})
    x_TD, grad_TD = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    one, other = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()
    positions = torch.arange(TOKENS)
    found = ours(one, positions, VarlenContext(torch.tensor([0, TOKENS])))
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
    wanted = theirs(
        other[None], attention_mask=mask, position_embeddings=make_rotary(theirs_config)(x_TD[None], positions[None])
    )[0][0]
    found.backward(grad_TD)
    wanted.backward(grad_TD)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    gradients = dict(theirs.named_parameters())
    for name, (place, ours_name) in named.items():
        torch.testing.assert_close(place.take(own[ours_name].grad), gradients[name].grad, rtol=1e-4, atol=1e-4)


def test_heads_that_ranks_can_not_share_are_refused():
    with pytest.raises(ConfigError, match=r"model.heads \(3\) must be a multiple of parallel.tp \(2\)"):
        layer(config(), torch.float32).keep_part(0, 2)
