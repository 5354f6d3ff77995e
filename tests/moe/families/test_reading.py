"""A rank reads its part of a model: the parts are the whole model's, in its dtypes, and compute on their ranks."""

import pytest
import torch

from turnout import ConfigError
from turnout.moe import Decoder, ModelConfig, MoEConfig, save_model
from turnout.moe.families.reading import load_part
from turnout.moe.models.init import init_weights
from turnout.moe.models.store import load_model
from turnout.parallel import ParallelConfig, build_mesh, parallelize
from turnout.tests.helpers.llama import llama
from turnout.tests.helpers.ranks import run_ranks


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
    return [n for n, t in theirs.items() if ours[n].dtype != t.dtype or not torch.equal(ours[n], t)]


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
