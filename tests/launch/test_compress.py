"""`turnout compress`: what it writes computes, is served, and is what its report says; what broke off goes on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from turnout.launch import compress as verb
from turnout.launch.compress import CompressOptions, compress
from turnout.launch.evaluate import EvaluateOptions, report
from turnout.launch.main import main
from turnout.moe import Decoder, ModelConfig, MoEConfig, load_model, save_model
from turnout.moe.compress import walk
from turnout.moe.data.corpus import read_documents
from turnout.moe.data.tokenizer import train_tokenizer
from turnout.moe.eval.perplexity import limit_bytes
from turnout.moe.models.init import init_weights

MOE = MoEConfig(every=1, width=64, expert_width=128, num_experts=4, capacity_tokens=64)
MODEL = ModelConfig(
    vocab_size=300, width=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn_width=128, max_seq_len=128, moe=MOE
)
SMALL = {"max_bytes": 3000, "samples": 4, "seq_len": 64, "speed": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model whose routers decide clearly."""
    place = tmp_path_factory.mktemp("whole")
    train_tokenizer(limit_bytes(read_documents("pydocs", "train"), 50_000), MODEL.vocab_size).save(place / "tokenizer")
    torch.manual_seed(0)
    model = Decoder(MODEL)
    init_weights(model, 0)
    tensors = {name: (30 if ".router." in name else 1) * weight for name, weight in model.state_dict().items()}
    return save_model(place / "model", MODEL, tensors, place / "tokenizer")


@pytest.fixture(scope="module")
def eight(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("eight") / "model"
    return target, compress(folder, target, CompressOptions(method="int8", **SMALL))


def test_the_report_is_what_evaluate_finds_of_both_models(folder, eight):
    target, found = eight
    for path, name in ((folder, "before"), (target, "after")):
        measured = report(path, EvaluateOptions(max_bytes=SMALL["max_bytes"]))
        assert found[f"loss_{name}"] == pytest.approx(measured["loss"], rel=2e-4)
    assert found["bytes_after"] < 0.3 * found["bytes_before"]
    assert found["bits_per_weight"] == pytest.approx(8, rel=0.15)
    assert [layer["agreement"] > 0.9 for layer in found["layers"]] == [True] * MODEL.layers


def test_the_result_is_a_model_with_its_report_and_picture_beside_it(eight):
    target, found = eight
    assert json.loads((target / "compress.json").read_text())["method"] == "int8"
    assert (target / "compress.png").read_bytes().startswith(b"\x89PNG")
    assert load_model(target).cfg.quantization.bits == 8
    assert not target.with_name("partial-model").exists()
    lines = "\n".join(verb.describe(found))
    assert "perplexity" in lines
    assert "same experts" in lines


def test_a_perplexity_that_no_float_holds_is_told_as_infinite(folder, tmp_path):
    model = load_model(folder)
    tensors = {name: (1e5 if name == "norm.weight" else 1) * weight for name, weight in model.state_dict().items()}
    save_model(tmp_path / "wild", MODEL, tensors, folder)
    found = compress(tmp_path / "wild", tmp_path / "m", CompressOptions(method="int8", **(SMALL | {"max_bytes": 500})))
    assert found["loss_after"] > 710
    assert "inf -> inf" in "\n".join(verb.describe(found))
    read = json.loads((tmp_path / "m" / "compress.json").read_text(), parse_constant=pytest.fail)
    assert (read["perplexity_after"], read["loss_after"]) == (None, found["loss_after"])
    assert (tmp_path / "m" / "compress.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_served_like_any_model(eight, capsys):
    target, _ = eight
    assert main(["generate", str(target), "prompt=import ", "max_tokens=4"]) == 0
    assert capsys.readouterr().out


def test_what_broke_off_goes_on_and_ends_the_same(folder, eight, tmp_path, monkeypatch):
    step, done = walk._step, []

    def breaks(source, index, *rest):
        if index == 2 and 2 not in done:
            done.append(index)
            raise KeyboardInterrupt
        done.append(index)
        return step(source, index, *rest)

    monkeypatch.setattr(walk, "_step", breaks)
    options = CompressOptions(method="int8", **SMALL)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, tmp_path / "m", options)
    found = compress(folder, tmp_path / "m", options)
    assert done == [0, 1, 2, 2], "the finished blocks are not made again"
    assert found["loss_after"] == eight[1]["loss_after"]
    ours, whole = load_model(tmp_path / "m").state_dict(), load_model(eight[0]).state_dict()
    assert all(torch.equal(ours[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in whole)


def test_what_another_setting_began_is_not_gone_on_with(folder, tmp_path, monkeypatch, capsys):
    def breaks(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(walk, "_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, tmp_path / "m", CompressOptions(method="int4", **SMALL))
    monkeypatch.undo()
    compress(folder, tmp_path / "m", CompressOptions(method="int8", **SMALL))
    assert load_model(tmp_path / "m").cfg.quantization.bits == 8
    assert "going on" not in capsys.readouterr().out


def test_what_other_files_began_is_not_gone_on_with(folder, tmp_path):
    text, model = tmp_path / "some.txt", tmp_path / "model"
    shutil.copytree(folder, model)
    text.write_text("one")
    found = verb.fingerprint(model, "pydocs", str(text), None)
    assert found == verb.fingerprint(model, "pydocs", str(text), None)
    text.write_text("three")
    assert found != (other := verb.fingerprint(model, "pydocs", str(text), None))
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert other != verb.fingerprint(model, "pydocs", str(text), None)


def test_memory_is_one_block_not_the_model(folder, tmp_path, monkeypatch):
    alive, most = set(), []
    make = walk._block

    def counted(source, index):
        block = make(source, index)
        alive.add(index)
        import weakref

        weakref.finalize(block, alive.discard, index)
        most.append(len(alive))
        return block

    monkeypatch.setattr(walk, "_block", counted)
    compress(folder, tmp_path / "m", CompressOptions(method="int8", **SMALL))
    assert max(most) == 1, most


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(folder, tmp_path, capsys):
    tensors = dict(load_model(folder).state_dict())
    name = "blocks.1.attention.wo.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 4] = torch.nan
    save_model(tmp_path / "bad", MODEL, tensors, folder)
    assert main(["compress", str(tmp_path / "bad"), str(tmp_path / "m"), "max_bytes=1000", "speed=false"]) == 6
    assert name in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_rounded_models_are_not_rounded_converted_or_trained(folder, eight, tmp_path, capsys):
    target, _ = eight
    for words in (
        ["compress", target, tmp_path / "a"],
        ["compress", target, tmp_path / "a", "method=scan", "max_bytes=500"],
        ["convert", target, tmp_path / "a"],
        ["train", f"train.init={target}", "train.steps=1", "train.seq_len=64", f"run={tmp_path / 'run'}"],
    ):
        assert main([str(word) for word in words]) == 2, words
        assert "quantization" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=int9"], "method"),
        (["method=experts"], "num_experts"),
        (["pattern=4:2"], "pattern"),
        (["smooth=2"], "smooth"),
        (["sparsity=1"], "sparsity"),
        (["method=wanda", "scope=global"], "scope"),
        (["samples=0"], "samples"),
        (["pattern=2:4"], "method=magnitude, wanda, sparsegpt, not int8"),
        (["max_bytes=0"], "max_bytes"),
    ],
)
def test_settings_that_can_not_be_are_refused(folder, tmp_path, words, message, capsys):
    assert main(["compress", str(folder), str(tmp_path / "m"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_target_that_is_the_source_or_no_model_is_refused(folder, tmp_path, capsys):
    assert main(["compress", str(folder), str(folder)]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["compress", str(folder), str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "letter.txt").is_file()


@pytest.mark.parametrize(
    "words",
    [
        {"method": "gptq"},
        {"method": "sparsegpt", "bits": 4, "min_rows": 4},
        {"method": "w8a8"},
        {"method": "fp8"},
        {"method": "int8", "scale": "tensor", "clip": "percentile", "percentile": 99.0},
        {"method": "int4", "zero": True, "clip": "mse", "embedding": False},
        {"method": "channels", "keep": 0.5},
        {"method": "experts", "num_experts": 2},
        {"method": "merge", "num_experts": 2},
        {"method": "layers", "num_layers": 2},
    ],
    ids=lambda words: " ".join(str(value) for value in words.values()),
)
def test_every_method_makes_a_model_that_loads_and_measures_as_reported(folder, tmp_path, words):
    found = compress(folder, tmp_path / "m", CompressOptions(**words, **(SMALL | {"max_bytes": 1500})))
    measured = report(tmp_path / "m", EvaluateOptions(max_bytes=1500))
    assert found["loss_after"] == pytest.approx(measured["loss"], rel=2e-4)
    assert found["bytes_after"] < found["bytes_before"]
    held = sum(tensor.numel() for tensor in load_model(tmp_path / "m").state_dict().values())
    if load_model(tmp_path / "m").cfg.quantization is None:
        assert held == found["parameters_after"] < found["parameters_before"]
    else:
        assert found["parameters_after"] == found["parameters_before"]


def test_experts_that_met_too_few_rows_are_named(folder, tmp_path):
    found = compress(folder, tmp_path / "m", CompressOptions(method="gptq", min_rows=10_000, **SMALL))
    words = "\n".join(verb.describe(found))
    for expert in range(MOE.num_experts):
        assert f"ffn.experts.w_in[{expert}]: saw" in words
    assert "attention" not in words, "what every row meets has met enough"


def test_fewer_blocks_are_the_models_own(folder, tmp_path):
    compress(folder, tmp_path / "m", CompressOptions(method="layers", num_layers=2, **(SMALL | {"max_bytes": 500})))
    whole, found = load_model(folder), load_model(tmp_path / "m").state_dict()
    whole.blocks = torch.nn.ModuleList(whole.blocks[:2])
    assert found.keys() == whole.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.state_dict().items())


def test_speed_is_measured_of_a_model_of_short_texts_too(folder, tmp_path):
    short = replace(MODEL, max_seq_len=16)
    save_model(tmp_path / "short", short, load_model(folder).state_dict(), folder)
    options = CompressOptions(method="int8", **(SMALL | {"max_bytes": 300, "speed": True}))
    found = compress(tmp_path / "short", tmp_path / "m", options)
    assert min(found["tokens_per_second_before"], found["tokens_per_second_after"]) > 0
    assert "one request" in "\n".join(verb.describe(found))


def test_a_scan_says_what_zeros_cost_by_block_and_shares_them_out(folder, tmp_path, capsys):
    assert main(["compress", str(folder), str(tmp_path / "scan"), "method=scan", "max_bytes=1500"]) == 0
    assert "block" in capsys.readouterr().out
    found = json.loads((tmp_path / "scan" / "scan.json").read_text())
    assert set(found["increases"]) == {"0", "1", "2"}
    assert (tmp_path / "scan" / "scan.png").read_bytes().startswith(b"\x89PNG")
    options = {"method": "magnitude", "shares": str(tmp_path / "scan" / "scan.json"), "sparsity": 0.4}
    made = compress(folder, tmp_path / "m", CompressOptions(**options, **SMALL))
    zeros = sum(layer["zeros"] * layer["weights"] for layer in made["layers"])
    assert zeros / sum(layer["weights"] for layer in made["layers"]) == pytest.approx(0.4, abs=0.01)
    (tmp_path / "scan" / "scan.json").write_text("{}")
    assert main(["compress", str(folder), str(tmp_path / "n"), *(f"{k}={v}" for k, v in options.items())]) == 2
    assert "method=scan" in capsys.readouterr().err


def test_calibration_without_text_is_an_error_and_nothing_is_written(folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    words = ["method=gptq", f"calibration={tmp_path / 'empty.txt'}", "max_bytes=1000", "speed=false"]
    assert main(["compress", str(folder), str(tmp_path / "m"), *words]) == 3
    assert "empty.txt" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
