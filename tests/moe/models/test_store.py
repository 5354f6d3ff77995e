"""The servable directory: what was saved is loaded, and what does not fit is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turnout import CheckpointError, ConfigError
from turnout.moe import VarlenContext, load_model, save_model
from turnout.moe.models.store import load_config


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model(tie_embeddings=False)
    return model, save_model(tmp_path / "model", model.cfg, dict(model.named_parameters()))


def logits(model):
    return model(torch.arange(9), torch.arange(9), VarlenContext(torch.tensor([0, 9])))


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_loaded_model_computes_the_same_bits(saved):
    model, path = saved
    for place in (path, path.parent, str(path)):  # a model directory, or the run around it
        loaded = load_model(place)
        assert loaded.cfg == model.cfg
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(logits(loaded), logits(model.eval()))


def test_dtype_is_cast_and_routers_stay_float32(saved):
    loaded = load_model(saved[1], dtype="bfloat16")
    assert {p.dtype for name, p in loaded.named_parameters() if "router" not in name} == {torch.bfloat16}
    assert {p.dtype for name, p in loaded.named_parameters() if "router" in name} == {torch.float32}
    exact = logits(saved[0].eval())
    assert (logits(loaded) - exact).norm() < 0.2 * exact.norm()


def test_loading_holds_the_model_once(make_model, tmp_path):
    model = make_model({"width": 256}, width=256, ffn_width=4096, layers=8)
    path = save_model(tmp_path / "model", model.cfg, dict(model.named_parameters()))
    size, dtype = sum(p.nbytes for p in model.parameters()), model.embed.weight.dtype
    del model
    load_model(path)  # what is imported on the way counts as here before
    peaks = []
    for stored in (str(dtype).removeprefix("torch."), "bfloat16"):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmHWM")
        loaded = load_model(path, stored)
        peaks.append((memory("VmHWM") - before) / size)
        del loaded
    assert peaks[0] < 1.4
    assert peaks[1] < 0.9


def memory(what):
    """Bytes, as the kernel counts them."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_the_tokenizer_travels_along(make_model, tmp_path):
    model = make_model()
    (tmp_path / "tokenizer.json").write_text("{}")
    tensors = dict(model.named_parameters())
    path = save_model(tmp_path / "model", model.cfg, tensors, tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert (save_model(tmp_path / "model", model.cfg, tensors, tmp_path) / "tokenizer_config.json").exists()
    with pytest.raises(CheckpointError, match="can not be written"):
        save_model(tmp_path / "model", model.cfg, tensors, tmp_path / "nowhere")
    assert (path / "model.safetensors").exists()


def test_saving_again_replaces_the_whole_directory(saved, make_model):
    _, path = saved
    (path / "stale.txt").write_text("old")
    other = make_model(seed=5)
    save_model(path, other.cfg, dict(other.named_parameters()))
    assert torch.equal(logits(load_model(path)), logits(other.eval()))
    assert sorted(file.name for file in path.parent.iterdir()) == ["model"]
    assert not (path / "stale.txt").exists()


def test_saving_an_incomplete_model_leaves_the_old_one(saved):
    model, path = saved
    tensors = dict(model.named_parameters())
    del tensors["norm.weight"]
    with pytest.raises(CheckpointError, match=r"tensors to save miss norm\.weight \(1 in all\)"):
        save_model(path, model.cfg, tensors)
    assert torch.equal(logits(load_model(path)), logits(model.eval()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("embed.weight"), r"miss embed\.weight"),
        (lambda t: t.update(extra=torch.ones(1)), r"add extra"),
        (lambda t: t.update({"norm.weight": torch.ones(23)}), r"norm\.weight \[23\] .* must have shape \[24\]"),
        (lambda t: t.update({"norm.weight": torch.ones(24).long()}), r"norm\.weight \(torch\.int64\).*floating point"),
    ],
    ids=["missing", "unexpected", "misshaped", "integer"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(saved, change, message):
    rewrite(saved[1], change)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved[1])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ConfigError, "does not read as JSON"),
        ("[]", ConfigError, "model_type"),
        ('{"model_type": "gpt5"}', ConfigError, r"model_type \(gpt5\)"),
        ('{"model_type": "turnout"}', ConfigError, "vocab_size is missing"),
    ],
)
def test_a_malformed_config_is_refused(saved, text, error, message):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        load_model(saved[1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("widht", 24, r"widht is not a setting: did you mean width\?"),
        ("layers", "four", r"layers \('four'\) must be a whole number"),
        ("heads", 5, r"model\.kv_heads \(2\) must divide model\.heads \(5\)"),
    ],
)
def test_a_config_with_a_wrong_field_names_it(saved, key, value, message):
    file = saved[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=message):
        load_config(saved[1])


def test_a_truncated_file_is_refused(saved):
    file = saved[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="does not read as safetensors"):
        load_model(saved[1])
    file.unlink()
    with pytest.raises(CheckpointError, match="does not read as safetensors"):
        load_model(saved[1])


def test_a_place_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model \(config\.json is missing\)"):
        load_model(tmp_path)


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(ConfigError, match=r"dtype \(float8\) is not supported: use auto, float32"):
        load_model(saved[1], dtype="float8")
