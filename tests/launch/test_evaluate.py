"""`turnout evaluate` says what the evaluation found, in words and in JSON."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from turnout import CheckpointError, ConfigError, DataError
from turnout.launch import rundir
from turnout.launch.compose import compose
from turnout.launch.evaluate import HELP, EvaluateOptions, describe, report
from turnout.launch.main import main
from turnout.moe import Decoder, ModelConfig, MoEConfig, save_model
from turnout.moe.data.corpus import read_documents
from turnout.moe.data.tokenizer import train_tokenizer
from turnout.moe.eval.perplexity import evaluate, limit_bytes

MOE = MoEConfig(width=16, expert_width=16, num_experts=4, capacity_tokens=64)
MODEL = ModelConfig(
    vocab_size=300, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_width=32, max_seq_len=128, moe=MOE
)
DROPLESS = MoEConfig(width=16, expert_width=16, num_experts=4, eval_capacity_factor=None)
LIMIT = 4000


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(limit_bytes(read_documents("pydocs", "train"), 50_000), MODEL.vocab_size)


def save(folder, cfg, tokenizer):
    """An untrained model with weights large enough for its experts to differ."""
    torch.manual_seed(0)
    model = Decoder(cfg)
    tensors = {name: 4 * weight.detach() for name, weight in model.named_parameters()}
    tokenizer.save(folder / "tokenizer")
    return save_model(folder / "model", cfg, tensors, folder / "tokenizer")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, tokenizer):
    return save(tmp_path_factory.mktemp("sparse"), MODEL, tokenizer)


def test_the_report_is_the_evaluation_of_the_held_out_documents(sparse, tokenizer):
    from turnout.moe import load_model

    found = report(sparse, EvaluateOptions(max_bytes=LIMIT))
    documents = limit_bytes(read_documents("pydocs", "validation"), LIMIT)
    expected = evaluate(load_model(sparse), tokenizer, documents, seq_len=64)
    assert found["loss"] == pytest.approx(expected.val_loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(expected.val_loss), rel=1e-6)
    assert found["bytes"] == LIMIT
    assert [layer["layer"] for layer in found["experts"]] == [1]
    assert sum(found["experts"][0]["expert_load"]) == pytest.approx(1)


def test_deterministic_evaluation_runs_our_kernels(sparse):
    from turnout.kernels.registry import using

    fast, slow = (report(sparse, EvaluateOptions(max_bytes=LIMIT, deterministic=own)) for own in (False, True))
    with using("invariant"):
        ours = report(sparse, EvaluateOptions(max_bytes=LIMIT))
    assert (slow["loss"], slow["shuffled_loss"]) == (ours["loss"], ours["shuffled_loss"])
    assert slow["loss"] == pytest.approx(fast["loss"], rel=1e-6)


def test_the_loss_with_shuffled_experts_is_another_one(sparse):
    found = report(sparse, EvaluateOptions(max_bytes=LIMIT))
    assert abs(found["shuffled_loss"] - found["loss"]) > 1e-4


def test_a_dense_model_has_no_experts_to_report(tmp_path, tokenizer):
    found = report(save(tmp_path, replace(MODEL, moe=None), tokenizer), EvaluateOptions(max_bytes=LIMIT))
    assert found["experts"] == []
    assert "shuffled_loss" not in found
    assert not any("experts" in line for line in describe(found))


def test_baselines_are_computed_on_the_same_text(sparse):
    found = report(sparse, EvaluateOptions(max_bytes=LIMIT, baselines=True, order=3))
    bits = found["markov"]["bits_per_byte"]
    assert list(bits) == ["2", "3"]
    assert 8 > bits["2"] > bits["3"] > 1
    assert [line.split()[-2:] for line in describe(found) if "Markov" in line] == [["not", "beaten"]] * 2


def test_the_verb_prints_the_numbers_that_it_writes(sparse, tmp_path, capsys):
    assert main(["evaluate", str(sparse), f"max_bytes={LIMIT}", f"json={tmp_path / 'out.json'}"]) == 0
    found, text = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert f"{found['loss']:.4f} nats a token (perplexity {found['perplexity']:.2f})" in text
    assert f"bits per byte   {found['bits_per_byte']:.3f}" in text
    assert "experts of layer 1: load" in text


def test_what_is_missing_is_an_error_that_names_it(sparse, tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        report(tmp_path, EvaluateOptions())
    with pytest.raises(DataError, match="is not a file"):
        report(sparse, EvaluateOptions(data=str(tmp_path / "none.txt")))


@pytest.mark.parametrize(
    ("moe", "deterministic"), [("trained", False), ("trained", True), ("dropless", False), (None, False)]
)
def test_the_engine_finds_the_loss_of_the_forward_pass(tmp_path, tokenizer, moe, deterministic):
    """Windows of several chunks, experts that drop what they drop in evaluation, documents of several windows."""
    kind = {"trained": replace(MOE, capacity_tokens=96, eval_capacity_factor=1.0), "dropless": DROPLESS, None: None}
    model = save(tmp_path, replace(MODEL, moe=kind[moe]), tokenizer)
    options = EvaluateOptions(max_bytes=LIMIT, seq_len=96, stride=64, deterministic=deterministic)
    expected, found = (report(model, replace(options, kv_dtype=kv)) for kv in (None, "auto"))
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert (found["tokens"], found["bytes"]) == (expected["tokens"], expected["bytes"])
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-4)
    if moe == "trained":
        assert expected["experts"][0]["drop_fraction"] > 0.05


def test_int8_pages_cost_little_and_something(tmp_path, tokenizer):
    model = save(tmp_path, replace(MODEL, moe=None), tokenizer)
    exact, eight = (report(model, EvaluateOptions(max_bytes=LIMIT, kv_dtype=kv)) for kv in ("auto", "int8"))
    assert 1e-6 < abs(eight["loss"] / exact["loss"] - 1) < 0.005
    assert [line for line in describe(eight) if "keys and values as int8" in line]
    assert eight["kv_dtype"] == "int8"
    assert eight["experts"] == []


def test_through_the_engine_a_window_is_shorter_than_the_longest_text(sparse):
    with pytest.raises(ConfigError, match=r"seq_len \(128\) must lie in 1 to 127 through the engine"):
        report(sparse, EvaluateOptions(max_bytes=LIMIT, seq_len=128, kv_dtype="auto"))


@pytest.mark.parametrize(
    "setting", ["order=8", "max_bytes=0", "split=test", "device=tpu", "baseline=true", "kv_dtype=int4"]
)
def test_a_bad_setting_exits_with_2(setting, capsys):
    assert main(["evaluate", "runs/none", setting]) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err


def test_every_option_is_in_the_help():
    assert all(f"{name}=" in HELP for name in vars(EvaluateOptions()))


def test_a_tuning_split_is_what_the_run_left_out(sparse, tmp_path):
    with pytest.raises(ConfigError, match=r"split \(tuning of .*\) is text that data\.tuning kept from a run"):
        report(sparse, EvaluateOptions(split="tuning"))
    with pytest.raises(ConfigError, match=r"train\.eval_split \(tuning\) is a share .*: use data\.tuning=0\.05"):
        compose(["train.eval_split=tuning"], 1)
    run = tmp_path / "run"
    shutil.copytree(sparse, run / "model")
    config = compose(["data.tuning=0.02", "train.eval_split=tuning"], 1).config
    rundir.freeze(run, config, [])
    found = report(run, EvaluateOptions(split="tuning", max_bytes=LIMIT))
    documents = limit_bytes(read_documents("pydocs", "tuning", 0.02), LIMIT)
    assert found["bytes"] == sum(len(text.encode()) for text in documents) > 0
    assert found["split"] == "tuning"


def test_a_draft_is_measured_against_the_model_and_must_speak_its_tokens(sparse, tokenizer, tmp_path):
    small = save(tmp_path, replace(MODEL, layers=1, moe=None), tokenizer)
    found = report(sparse, EvaluateOptions(max_bytes=500, draft=str(small)))
    draft = found["draft"]
    assert 0 < draft["acceptance"] < 1
    assert 1 < draft["expected_tokens"]["2"] < draft["expected_tokens"]["8"] < 9
    assert any("of its tokens taken" in line for line in describe(found))
    other = save(tmp_path / "other", replace(MODEL, layers=1, moe=None), train_tokenizer(["abc " * 99], 300))
    with pytest.raises(ConfigError, match=r"draft \(.*other.*\) has another tokenizer"):
        report(sparse, EvaluateOptions(seq_len=10**6, draft=str(other)))  # before a length that can not be measured
