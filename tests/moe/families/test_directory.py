"""Broken directories are refused by name and leave nothing behind; large ones are read and written in parts."""

import json
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from turnout import CheckpointError, ConfigError
from turnout.launch.main import main
from turnout.moe import load_model
from turnout.moe.families.directory import read_foreign, save_foreign
from turnout.moe.families.shards import INDEX, ONE
from turnout.tests.helpers import foreign
from turnout.tests.moe.families.parity import assert_same_tensors, read_tensors

MOST = 20_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "whole"
    foreign.make(folder, MixtralForCausalLM, MixtralConfig, num_local_experts=3)
    return folder


@pytest.fixture(scope="module")
def parts(whole):
    """The same in several files with an index."""
    model, found = load_model(whole), read_foreign(whole)
    return save_foreign(
        whole.with_name("parts"), model.cfg, model.state_dict(), "mixtral", origin=found.data, beside=whole, most=MOST
    )


def test_parts_hold_what_the_whole_does_and_none_is_too_large(whole, parts):
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= MOST or len(sizes) == 1
    assert_same_tensors(whole, parts)
    index = json.loads((parts / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_tensors(parts).values())
    for name, weight in MixtralForCausalLM.from_pretrained(parts).state_dict().items():
        assert torch.equal(weight, MixtralForCausalLM.from_pretrained(whole).state_dict()[name])
    for name, weight in load_model(parts).state_dict().items():
        assert torch.equal(weight, load_model(whole).state_dict()[name])


def missing(tensors, name, rng):
    del tensors[name]


def misshaped(tensors, name, rng):
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def misnamed(tensors, name, rng):
    tensors[name.replace("weight", "wieght")] = tensors.pop(name)


def integers(tensors, name, rng):
    tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.int64, torch.uint8]))


def extra(tensors, name, rng):
    tensors[name + "_scale"] = torch.ones(1)


BREAKS = [missing, misshaped, misnamed, integers, extra]


@pytest.mark.parametrize("broken", BREAKS, ids=[way.__name__ for way in BREAKS])
def test_a_tensor_that_does_not_fit_is_named(whole, tmp_path, broken, capsys):
    rng, tensors = random.Random(broken.__name__), load_file(whole / ONE)
    for name in rng.sample(sorted(tensors), 6):
        copy = tmp_path / name
        shutil.copytree(whole, copy)
        changed = dict(tensors)
        broken(changed, name, rng)
        save_file(changed, copy / ONE)
        refused(copy, re.escape(name), capsys)


def test_a_file_cut_anywhere_is_named(whole, tmp_path, capsys):
    rng, size = random.Random(0), (whole / ONE).stat().st_size
    for cut in (0, 5, 100, *(rng.randrange(size) for _ in range(5)), size - 1):
        copy = tmp_path / str(cut)
        shutil.copytree(whole, copy)
        (copy / ONE).write_bytes((whole / ONE).read_bytes()[:cut])
        refused(copy, re.escape(ONE), capsys)


def other_shard(index, rng):
    name, file = rng.choice(sorted(index["weight_map"].items()))
    index["weight_map"][name] = next(f for f in index["weight_map"].values() if f != file)
    return re.escape(name)


def unlisted(index, rng):
    name = rng.choice(sorted(index["weight_map"]))
    del index["weight_map"][name]
    return re.escape(name)


def unknown_file(index, rng):
    name = rng.choice(sorted(index["weight_map"]))
    index["weight_map"][name] = "model-00099.safetensors"
    return "model-00099|" + re.escape(name)


def outside(index, rng):
    index["weight_map"][rng.choice(sorted(index["weight_map"]))] = "../whole/model.safetensors"
    return "must be a file beside it"


def no_map(index, rng):
    del index["weight_map"]
    return "does not read as an index"


def a_list(index, rng):
    index["weight_map"] = ["a", "b"]
    return "does not read as an index"


@pytest.mark.parametrize("broken", [other_shard, unlisted, unknown_file, outside, no_map, a_list])
def test_a_wrong_index_is_named(parts, tmp_path, broken, capsys):
    rng = random.Random(0)
    for turn in range(3):
        copy = tmp_path / str(turn)
        shutil.copytree(parts, copy)
        index = json.loads((copy / INDEX).read_text())
        rule = broken(index, rng)
        (copy / INDEX).write_text(json.dumps(index))
        refused(copy, rule, capsys)


def test_a_shard_that_is_not_there_is_named(parts, tmp_path, capsys):
    for file in sorted(parts.glob("*.safetensors"))[:3]:
        copy = tmp_path / file.stem
        shutil.copytree(parts, copy)
        (copy / file.name).unlink()
        refused(copy, re.escape(file.name), capsys)


def test_a_pickle_is_never_read(whole, tmp_path, capsys):
    copy = tmp_path / "pickled"
    shutil.copytree(whole, copy)
    (copy / ONE).rename(copy / "pytorch_model.bin")
    refused(copy, r"pytorch_model\.bin is a pickle", capsys)


def refused(folder, rule, capsys):
    """Loading names what is wrong, and a conversion leaves nothing where it should have written."""
    with pytest.raises(CheckpointError, match=rule):
        load_model(folder)
    target = folder.with_name("target")
    assert main(["convert", str(folder), str(target)]) == 6
    assert re.search(rule, capsys.readouterr().err)
    assert not [file for file in folder.parent.iterdir() if "target" in file.name]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"model_type": "gpt2"}, r"model_type \(gpt2\)"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"hidden_act": "gelu"}, r"hidden_act \(gelu\)"),
        ({"num_key_value_heads": 3}, r"kv_heads \(3\)"),
        ({"num_attention_heads": None}, r"num_attention_heads \(missing\)"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_type \(longrope\)"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "does not read as a mixtral .*factor"),
        ({"num_local_experts": "four"}, "does not read as a mixtral"),
        ({"vocab_size": 320.5}, r"vocab_size \(320.5\)"),
        ({"sliding_window": [3]}, "does not read as a mixtral"),
    ],
)
def test_a_configuration_that_is_not_computed_is_named(whole, tmp_path, change, rule):
    shutil.copytree(whole, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=rule):
        load_model(tmp_path / "copy")


PEAK = """
import resource, sys, threading, time
import torch
import turnout.moe.families.directory
from turnout.moe import load_model

def resident():
    with open("/proc/self/statm") as file:
        pages = file.read().split()
    return (int(pages[1]) - int(pages[2])) * resource.getpagesize()  # what is not backed by the mapped file

load_model(sys.argv[2])  # what the first load takes for itself
start, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1])
done = True
thread.join()
sizes = [tensor.nbytes for tensor in model.state_dict().values()]
print(peak - start, sum(sizes), max(sizes))
"""


@pytest.mark.full
def test_loading_takes_no_more_than_the_model_and_its_largest_tensor(whole, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096, "num_local_experts": 8}
    foreign.make(tmp_path / "large", MixtralForCausalLM, MixtralConfig, **sizes)
    words = [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(whole)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    peak, model, largest = map(int, result.stdout.split())
    assert model > 100 * 2**20
    assert peak <= model + largest + 16 * 2**20
