"""`turnout convert`: there and back to the bit, and a report."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from turnout.launch.main import main
from turnout.moe import Decoder, ModelConfig, MoEConfig, load_model, save_model
from turnout.moe.models.init import init_weights
from turnout.tests.helpers import foreign
from turnout.tests.helpers.llama import llama
from turnout.tests.moe.families.parity import assert_logits, assert_same_tensors, packed_logits, tokens


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """In bfloat16, with a window."""
    folder = tmp_path_factory.mktemp("theirs") / "mixtral"
    sizes = {"num_local_experts": 4, "sliding_window": 16}
    return folder, foreign.make(folder, MixtralForCausalLM, MixtralConfig, torch.bfloat16, **sizes)


def save_ours(folder, layers, **moe):
    """A model that is no foreigner's, with four experts in every other block."""
    sparse = MoEConfig(width=32, expert_width=24, num_experts=4, **moe)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_width": 48, "max_seq_len": 64}
    ours = Decoder(ModelConfig(vocab_size=97, width=32, layers=layers, moe=sparse, **sizes))
    init_weights(ours, 0)
    save_model(folder, ours.cfg, ours.state_dict())
    return ours.eval()


def run(*words):
    return main(["convert", *map(str, words)])


def test_there_and_back_is_the_same_to_the_bit(mixtral, tmp_path, capsys):
    folder, _ = mixtral
    assert run(folder, tmp_path / "ours", f"json={tmp_path / 'report.json'}") == 0
    assert run(tmp_path / "ours", tmp_path / "back") == 0
    assert_same_tensors(folder, tmp_path / "back")
    assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "back").iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((folder / name).read_text()), name
    assert load_model(tmp_path / "ours").cfg == load_model(folder).cfg
    assert load_model(tmp_path / "ours").cfg.eos_token_ids == (1, 3)

    report = json.loads((tmp_path / "report.json").read_text())
    expert = 3 * 32 * 40
    total = sum(tensor.numel() for tensor in load_model(folder).state_dict().values())
    assert report["parameters"] == total
    assert report["active_parameters"] == total - 2 * 2 * expert
    assert report["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 2
    assert (report["attention"], report["window"], report["dtype"]) == ("grouped-query", 16, "bfloat16")
    assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / "ours").glob("*.safetensors"))
    assert f"{total:,}" in capsys.readouterr().out


def test_a_wider_dtype_in_between_loses_nothing(mixtral, tmp_path):
    folder, _ = mixtral
    assert run(folder, tmp_path / "ours", "dtype=float32") == 0
    assert load_model(tmp_path / "ours").embed.weight.dtype == torch.float32
    assert run(tmp_path / "ours", tmp_path / "back") == 0
    assert_same_tensors(folder, tmp_path / "back")


def test_theirs_to_theirs_in_another_dtype(mixtral, tmp_path):
    folder, theirs = mixtral
    assert run(folder, tmp_path / "wide", "to=mixtral", "dtype=float32") == 0
    again = MixtralForCausalLM.from_pretrained(tmp_path / "wide")
    assert again.dtype == torch.float32
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name].float()), name


def test_our_own_model_goes_to_the_first_family_that_computes_it(tmp_path):
    moe = {"eval_capacity_factor": None, "shared_experts": 1, "shared_gate": True, "init_scale": 3.0}
    ours = save_ours(tmp_path / "ours", layers=4, **moe)
    assert run(tmp_path / "ours", tmp_path / "theirs") == 0
    theirs = Qwen2MoeForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    row = tokens(97, (40,))[0]
    with torch.no_grad():
        assert_logits(packed_logits(ours, [row]), theirs(row[None]).logits[0])


def test_what_no_family_computes_stays_ours_and_each_says_why(tmp_path, capsys):
    save_ours(tmp_path / "ours", layers=2, router="topk_softmax")
    assert run(tmp_path / "ours", tmp_path / "theirs") == 2
    assert not (tmp_path / "theirs").exists()
    told = capsys.readouterr().err
    for family in ("llama", "mixtral", "qwen2_moe", "olmoe"):
        assert re.search(rf"{family}: \S+ \(.+\) ", told), told
    assert run(tmp_path / "ours", tmp_path / "theirs", "to=mixtral") == 2
    assert "moe.eval_capacity_factor (2.0, there None)" in capsys.readouterr().err


def test_what_nobody_reads_and_what_is_left_out_is_named(tmp_path, capsys, caplog):
    foreign.make(tmp_path / "theirs", LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True)
    file = tmp_path / "theirs" / "config.json"
    data = json.loads(file.read_text())
    data |= {"strange_gate": 3, "torch_dtype": data.pop("dtype"), "rope_theta": 5000.0, "rope_scaling": None}
    del data["rope_parameters"]
    file.write_text(json.dumps(data))
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(weights | extra, tmp_path / "theirs" / "model.safetensors")
    assert run(tmp_path / "theirs", tmp_path / "ours") == 0
    told = capsys.readouterr().out
    assert "strange_gate" in told
    assert "lm_head.weight" in told
    assert load_model(tmp_path / "ours").cfg.rope_theta == 5000.0
    load_model(tmp_path / "theirs")
    assert "strange_gate" in caplog.text


@pytest.mark.parametrize(
    "words",
    [("{src}", "{src}"), ("{src}", "{full}"), ("{src}", "{new}", "to=gpt5"), ("{new}", "{new}x")],
    ids=["itself", "notes", "kind", "nothing"],
)
def test_a_bad_command_writes_nothing(mixtral, tmp_path, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    places = {"src": mixtral[0], "full": tmp_path / "full", "new": tmp_path / "new"}
    assert run(*(word.format(**places) for word in words)) in (2, 6)
    assert [file.name for file in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.full
def test_a_family_other_than_its_own(tmp_path):
    """A Qwen3-MoE without what is special about it is no Mixtral: its norms can not be said there."""
    foreign.make(tmp_path / "theirs", Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2)
    assert run(tmp_path / "theirs", tmp_path / "other", "to=mixtral") == 2
    assert not (tmp_path / "other").exists()


def test_a_dense_model_is_made_sparse_on_the_way(tmp_path):
    dense = llama(tmp_path / "llama")
    assert run(dense, tmp_path / "sparse", "upcycle.num_experts=8", "upcycle.granularity=2") == 0
    sparse = load_model(tmp_path / "sparse")
    assert (sparse.cfg.moe.num_experts, sparse.cfg.moe.top_k, sparse.cfg.moe_layers) == (8, 4, (1, 3))
    assert not (tmp_path / "sparse" / "origin.json").exists(), "it has no way back"
    ids = tokens(sparse.cfg.vocab_size, (40, 24))
    theirs, ours = packed_logits(load_model(dense), ids), packed_logits(sparse, ids)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_settings_of_upcycling_are_refused_by_name(tmp_path, capsys):
    dense = llama(tmp_path / "llama")
    assert run(dense, tmp_path / "sparse", "upcycle.num_experts=8", "upcycle.granularity=5") == 2
    assert "upcycle.num_experts (8) must be a multiple of upcycle.granularity (5)" in capsys.readouterr().err
    assert run(dense, tmp_path / "sparse", "upcycle.num_experts=10", "upcycle.granularity=5") == 2
    assert "upcycle.granularity (5) must divide model.ffn_width (48)" in capsys.readouterr().err
