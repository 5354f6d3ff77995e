"""Biases by distance against T5's own."""

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from turnout.kernels.reference.attention import distance_bias
from turnout.moe.config import AttentionConfig, ModelConfig
from turnout.moe.layers.relative import RelativeBias


def make(buckets: int, longest: int, causal: bool) -> tuple[RelativeBias, T5Attention]:
    sizes = {"vocab_size": 9, "width": 12, "layers": 1, "heads": 3, "kv_heads": 3, "head_dim": 4, "ffn_width": 4}
    own = AttentionConfig(positions="relative", buckets=buckets, max_distance=longest)
    ours = RelativeBias(ModelConfig(**sizes, max_seq_len=999, attention=own), causal)
    theirs = T5Attention(
        T5Config(
            d_model=12, d_kv=4, num_heads=3, is_decoder=causal, relative_attention_num_buckets=buckets,
            relative_attention_max_distance=longest,
        ),
        has_relative_attention_bias=True,
    )  # fmt: skip
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    with torch.no_grad():
        ours.weight.copy_(theirs.relative_attention_bias.weight)
    return ours, theirs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (4, 3), (64, 1000)])
def test_every_distance_has_the_bucket_that_it_has_there(buckets, longest, causal):
    ours, _ = make(buckets, longest, causal)
    ahead = torch.arange(-3 * longest, 3 * longest + 1)
    truth = T5Attention._relative_position_bucket(ahead, not causal, buckets, longest)
    assert torch.equal(ours.bucket(ahead), truth)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (50, 50), (1, 70), (7, 30)])
def test_the_whole_bias_is_theirs(queries, keys, causal):
    ours, theirs = make(8, 20, causal)
    past = keys - queries
    truth = theirs.compute_bias(queries, keys, past_seen_tokens=past)[0]
    found = distance_bias(ours(), torch.arange(past, keys), torch.arange(keys))
    assert torch.equal(found, truth)
