"""A rank reads its part of a model: the parts are the whole model's, in its dtypes, and compute on their ranks."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from turnout import CheckpointError, ConfigError
from turnout.moe import Decoder, ModelConfig, MoEConfig, save_model
from turnout.moe.families.conversion import read_whole
from turnout.moe.families.reading import load_part, open_source
from turnout.moe.models.init import init_weights
from turnout.moe.models.store import WEIGHTS, load_model
from turnout.moe.quantization_config import QuantizationConfig
from turnout.parallel import ParallelConfig, build_mesh, parallelize
from turnout.tests.helpers.decoders import make_model
from turnout.tests.helpers.llama import llama
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.rounded import rounded


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Five experts; weights stored in bfloat16."""
    moe = MoEConfig(width=16, expert_width=8, num_experts=5, router="topk_softmax", top_k=2)
    cfg = ModelConfig(
        vocab_size=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn_width=24, max_seq_len=64, moe=moe
    )
    model = Decoder(cfg)
    init_weights(model, 0)
    model.to(torch.bfloat16)
    return save_model(tmp_path_factory.mktemp("sparse") / "model", cfg, model.state_dict())


def differences(path: str, sizes: dict, dtype: str | None) -> list[str]:
    """Names of this rank's tensors that are not the whole model's, divided afterwards."""
    mesh = build_mesh(ParallelConfig(**sizes))
    part = load_part(path, mesh, dtype)
    whole = load_model(path, dtype)
    parallelize(whole, mesh, uneven=True)
    ours, theirs = part.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert not part.training
    tokens_T = torch.tensor([3])
    assert torch.equal(part.embed(tokens_T), whole.embed(tokens_T))
    return [n for n, t in theirs.items() if ours[n].dtype != t.dtype or not torch.equal(codes(ours[n]), codes(t))]


def codes(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, which can be compared whatever they mean."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"tp": 2}, {"tp": 2, "ep": 2}], ids=str)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_part_is_the_same_part_of_the_whole(sparse, sizes, dtype):
    assert run_ranks(differences, 2, str(sparse), sizes, dtype) == [[], []]


def test_a_foreign_model_is_read_in_parts_too(tmp_path):
    path = str(llama(tmp_path / "llama"))
    assert run_ranks(differences, 2, path, {"tp": 2}, None) == [[], []]


def test_an_unknown_dtype_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"dtype \(int3\) is not supported"):
        load_part(tmp_path, build_mesh(ParallelConfig()), "int3")


KINDS = {
    "int8": {},
    "int4": {"bits": 4, "group": 64},
    "zero points": {"group": 64, "zero": True},
    "w8a8": {"rows": "int8"},
    "fp8": {"kind": "float", "embedding": False},
}
LAYOUTS = [(2, {"ep": 2}), (2, {"tp": 2}), (3, {"ep": 3}), (4, {"tp": 2, "ep": 4})]


@pytest.fixture(scope="module")
def few_bits(tmp_path_factory) -> Callable[[str], str]:
    """The directory of a model whose matrices are rounded, by how they are."""

    def save(kind: str) -> str:
        moe = {"width": 64, "expert_width": 64, "bias": True}
        model = make_model(moe, width=64, head_dim=16, ffn_width=128, layers=2, activation="swiglu")
        model = rounded(model, QuantizationConfig(**KINDS[kind]))
        return str(save_model(tmp_path_factory.mktemp("few") / "model", model.cfg, model.state_dict()))

    return save


def test_of_a_rounded_model_too(few_bits):
    assert run_ranks(differences, 2, few_bits("zero points"), {"tp": 2, "ep": 2}, "bfloat16") == [[], []]


@pytest.mark.full
@pytest.mark.parametrize(("world", "sizes"), LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind_of_rounded_model_in_every_layout(few_bits, kind, world, sizes):
    for dtype in (None, "bfloat16"):
        assert run_ranks(differences, world, few_bits(kind), sizes, dtype) == [[]] * world


def sizes_of(path: str, sizes: dict) -> dict[str, tuple[int, ...]]:
    part = load_part(path, build_mesh(ParallelConfig(**sizes)))
    return {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}


def test_a_rank_holds_the_codes_and_scales_of_its_experts_and_of_its_output_features(few_bits):
    for held in run_ranks(sizes_of, 2, few_bits("int4"), {"tp": 2, "ep": 2}):
        experts, attention = "blocks.1.ffn.experts.", "blocks.1.attention."
        assert held[f"{experts}w_in.q"] == (2, 128, 32)
        assert held[f"{experts}w_in.scale"] == (2, 128, 1)
        assert held[f"{experts}w_in.zero"] == (0,), "symmetric"
        assert held[f"{attention}wq.q"] == held[f"{attention}wo.q"] == (32, 32), "half of 64 rows, two numbers a byte"
        assert held[f"{attention}wo.scale"] == (32, 1)
        assert held["blocks.0.ffn.w_in.q"] == (128, 32)
        assert held["embed.q"][1] == 64


def test_rounded_weights_are_refused_by_name_where_whole_ones_are_needed(few_bits):
    path, says = few_bits("int8"), r"quantization .* whole weights are needed here: give the model it was made of"
    with pytest.raises(ConfigError, match=says), open_source(path):
        pass
    with pytest.raises(ConfigError, match=says):
        read_whole(path)


def test_a_part_of_codes_of_another_type_is_refused_by_name(few_bits):
    path = few_bits("int8")
    tensors = load_file(f"{path}/{WEIGHTS}")
    tensors["blocks.0.attention.wq.q"] = tensors["blocks.0.attention.wq.q"].float()
    save_file(tensors, f"{path}/{WEIGHTS}")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attention\.wq\.q \(torch\.float32\).*torch\.int8"):
        load_part(path, build_mesh(ParallelConfig()))
