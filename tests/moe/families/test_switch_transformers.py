"""Switch Transformers against transformers' own class: logits, drops, and the way out and back to the byte."""

import filecmp
import json
from dataclasses import replace

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from turnout import ConfigError
from turnout.moe.families.directory import read_foreign, save_foreign
from turnout.moe.families.place import check_cover
from turnout.moe.families.switch_transformers import sparse_blocks
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.store import load_model

SMALL = {
    "vocab_size": 99, "d_model": 24, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4,
}  # fmt: skip
CASES = [
    {},
    {"num_layers": 3, "num_decoder_layers": 4, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 2}
    | {"expert_capacity": 3, "dense_act_fn": "gelu"},
    {"num_sparse_decoder_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    | {"expert_capacity": 2, "decoder_start_token_id": 5},
]
SOURCE, TARGET = torch.arange(40) * 7 % 99, torch.arange(30) * 11 % 99


def peer(changed, directory):
    """Their model, written into `directory`."""
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SMALL | changed)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def logits_of(theirs):
    return theirs(input_ids=SOURCE[None], decoder_input_ids=TARGET[None]).logits[0]


@torch.no_grad()
def ours_of(model):
    source, seen = VarlenContext(torch.tensor([0, 40])), torch.tensor([0, 40])
    memory = model.encode(SOURCE, torch.arange(40), source)
    ctx = VarlenContext(torch.tensor([0, 30]), memory=memory, cu_memory_B1=seen)
    kept = [routing.kept_TK for each in (source, ctx) for routing in each.routings.values()]
    logits = model(TARGET, torch.arange(30), ctx)
    return logits, [*kept, *(routing.kept_TK for routing in ctx.routings.values())]


@pytest.mark.parametrize("changed", CASES)
def test_logits_are_those_of_transformers_and_the_directory_comes_back_to_the_byte(changed, tmp_path):
    wanted, model = logits_of(peer(changed, tmp_path / "theirs")), load_model(tmp_path / "theirs")
    logits, kept = ours_of(model)
    assert float((logits - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    assert all(bool(k.all()) for k in kept) == ("expert_capacity" not in changed), "the small capacities drop tokens"
    found = read_foreign(tmp_path / "theirs")
    assert found.unknown == ()
    check_cover(found.family.places(model.cfg), model.state_dict())
    save_foreign(tmp_path / "back", model.cfg, model.state_dict(), "switch_transformers", origin=found.data)
    names = ["model.safetensors"]
    assert filecmp.cmpfiles(tmp_path / "theirs", tmp_path / "back", names, shallow=False)[0] == names
    read = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "back")]
    assert read[0] == read[1]


@pytest.mark.parametrize("changed", CASES)
def test_a_configuration_written_anew_loads_in_transformers_and_here(changed, tmp_path):
    wanted, model = logits_of(peer(changed, tmp_path / "theirs")), load_model(tmp_path / "theirs")
    save_foreign(tmp_path / "new", model.cfg, model.state_dict(), "switch_transformers")
    assert read_foreign(tmp_path / "new").cfg == model.cfg
    again = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(logits_of(again), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("layers", "asked"), [(12, 6), (12, 3), (3, 0), (1, 0), (2, 3), (5, 2)])
def test_the_sparse_blocks_are_theirs(layers, asked):
    config = SwitchTransformersConfig(
        **SMALL | {"num_layers": layers, "num_sparse_encoder_layers": asked, "num_sparse_decoder_layers": 1}
    )
    with torch.device("meta"):
        blocks = SwitchTransformersForConditionalGeneration(config).encoder.block
    theirs = tuple(i for i, block in enumerate(blocks) if hasattr(block.layer[-1].mlp, "router"))
    assert sparse_blocks(layers, asked) == theirs


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"router_bias": True}, "router_bias"),
        ({"dense_act_fn": "silu"}, "dense_act_fn"),
    ],
)
def test_what_is_not_computed_here_is_refused(changed, named, tmp_path):
    SwitchTransformersConfig(**SMALL | changed).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named):
        read_foreign(tmp_path)


def test_what_they_can_not_compute_is_not_written(tmp_path):
    peer({}, tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    for cfg, named in [
        (replace(model.cfg, logit_scale=1.0), "logit_scale"),
        (replace(model.cfg, moe=replace(model.cfg.moe, sparse_layers=(0,))), "sparse_layers"),
        (replace(model.cfg, moe=replace(model.cfg.moe, eval_capacity_factor=2.0)), "eval_capacity_factor"),
        (replace(model.cfg, moe=replace(model.cfg.moe, expert_width=8)), "experts"),
    ]:
        with pytest.raises(ConfigError, match=named):
            save_foreign(tmp_path / "x", cfg, model.state_dict(), "switch_transformers")
