"""The size of the KV cache is planned as data."""

from pathlib import Path

import pytest
import torch

from turnout import ConfigError
from turnout.inference.config import EngineConfig
from turnout.inference.run.kv import MIB, KVCache, plan_kv
from turnout.moe.config import AttentionConfig, LatentConfig

BYTES = 2 * 4 * 16 * 2 * 8 * 4  # keys and values, layers, block size, kv heads, head size, float32


def plan(model, free=1 << 40, dtype=torch.float32, **config):
    return plan_kv(model.cfg, EngineConfig(**config), 256, dtype, free)


def test_the_tensors_take_exactly_the_planned_bytes(model):
    found = plan(model, num_blocks=10)
    cache = KVCache(found, torch.device("cpu"))
    assert found.bytes_per_block == BYTES
    assert cache.keys.nbytes + cache.values.nbytes == found.total_bytes == 10 * BYTES
    assert cache.layer(3)[0].shape == (10, 16, 2, 8)
    assert plan(model, num_blocks=10, dtype=torch.bfloat16).total_bytes == 5 * BYTES


LATENT = AttentionConfig(latent=LatentConfig(rank=12, rope_dim=4, value_dim=6))
FORMS = {  # layers 4, heads 4 of 8
    "MHA": ({"kv_heads": 4}, 4 * 2 * 4 * 8),
    "GQA": ({"kv_heads": 2}, 4 * 2 * 2 * 8),
    "MQA": ({"kv_heads": 1}, 4 * 2 * 1 * 8),
    "MLA": ({"kv_heads": 4, "attention": LATENT}, 4 * (12 + 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_token_takes_the_bytes_of_the_formula(make_model, form, dtype):
    changes, numbers = FORMS[form]
    model = make_model(**changes)
    cache = KVCache(plan(model, num_blocks=10, dtype=dtype), torch.device("cpu"))
    stores = {kept.untyped_storage().data_ptr(): kept.untyped_storage().nbytes() for kept in (cache.keys, cache.values)}
    assert sum(stores.values()) / (10 * 16) == numbers * dtype.itemsize
    keys, values = cache.layer(3)
    assert (keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()) == (form == "MLA")


def test_the_first_tokens_can_have_their_memory_early(model):
    cache = KVCache(plan(model, num_blocks=8192), torch.device("cpu"))  # 8 MiB a layer, keys and values each
    before = resident()
    cache.populate(16 * 4095)
    assert 24 * MIB < resident() - before < 40 * MIB
    cache.populate(10**9)
    assert 48 * MIB < resident() - before < 80 * MIB
    assert not cache.keys.any()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_what_sets_the_size_is_named(model):
    assert str(plan(model, num_blocks=9)) == (
        "KV cache: 9 blocks of 16 tokens, 128 tokens, 0.1 MiB as float32 (set by num_blocks)"
    )
    memory = plan(model, kv_memory_mb=3)
    assert (memory.num_blocks, memory.limit) == (3 * MIB // BYTES, "kv_memory_mb")
    whole = plan(model, max_num_seqs=3)
    assert (whole.num_blocks, whole.limit) == (1 + 3 * 256 // 16, "max_num_seqs")
    scarce = plan(model, max_num_seqs=3, free=5 * BYTES + 1)
    assert (scarce.num_blocks, scarce.limit) == (5, "free memory")


def test_an_encoder_decoder_has_room_for_input_and_output_at_their_longest(t5):
    assert plan(t5, max_num_seqs=3).num_blocks == 1 + 3 * 2 * 256 // 16
    assert plan(t5, num_blocks=10).bytes_per_block == 2 * 2 * 16 * 4 * 8 * 4, "of the decoder's layers alone"


def test_too_little_memory_names_the_fix(model):
    with pytest.raises(ConfigError, match=r"free memory \(0 MiB\) must hold 2 blocks of 0.01 MiB: use kv_memory_mb=1"):
        plan(model, free=BYTES)
    with pytest.raises(ConfigError, match=r"kv_memory_mb \(1 MiB\) must hold 2 blocks"):
        plan(model, kv_memory_mb=1, block_size=2048)


def test_int8_takes_a_byte_a_number_and_a_scale_a_head_and_token(model):
    found = plan(model, num_blocks=10, kv_dtype="int8", dtype=torch.bfloat16)
    cache = KVCache(found, torch.device("cpu"))
    assert found.bytes_per_block == 2 * 4 * 16 * 2 * (8 + 4)
    assert sum(tensor.nbytes for tensor in cache.pages) == found.total_bytes
    assert [scale.shape for scale in cache.scales(3)] == [(10, 16, 2)] * 2
    assert "as int8" in str(found)


def test_int8_is_refused_for_latents(make_model):
    model = make_model(kv_heads=4, attention=LATENT)
    with pytest.raises(ConfigError, match=r"kv_dtype \(int8\) must be auto for latent attention"):
        plan(model, kv_dtype="int8")


@pytest.mark.parametrize(
    ("changes", "kv_dtype", "tensors"),
    [({}, "auto", 2), ({}, "int8", 4), ({"kv_heads": 4, "attention": LATENT}, "auto", 1)],
)
def test_a_copied_block_is_copied_in_every_layer_with_all_that_belongs_to_it(make_model, changes, kv_dtype, tensors):
    cache = KVCache(plan(make_model(**changes), num_blocks=5, kv_dtype=kv_dtype), torch.device("cpu"))
    cache.pages.append(torch.zeros(2, 5, 16, 3, dtype=torch.int16))  # as experts' choices are kept
    for tensor in cache.pages:
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 101)
    before = [tensor.clone() for tensor in cache.pages]
    cache.copy([(1, 4), (2, 3)])
    assert len(before) == tensors + 1
    for tensor, old in zip(cache.pages, before, strict=True):
        assert torch.equal(tensor, old[:, [0, 1, 2, 2, 1]])
    cache.copy([])
