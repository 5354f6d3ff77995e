"""A setting that can not work is refused when it is made, with the field, the value and the fix."""

import pytest

from turnout import ConfigError
from turnout.configs.typed import build, to_dict
from turnout.inference.config import EngineConfig


def test_defaults_are_valid_and_survive_a_round_trip():
    assert build(EngineConfig, to_dict(EngineConfig())) == EngineConfig()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 63),
        ("block_size", 0),
        ("num_blocks", 1),
        ("max_model_len", 0),
        ("max_waiting", 0),
        ("queue_timeout", 0.0),
        ("kv_memory_mb", 0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"^{field} \({value}\) must .*: "):
        EngineConfig(**{field: value})


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="dtype"):
        build(EngineConfig, {"dtype": "int3"})


def test_an_unknown_way_to_fill_experts_is_refused():
    with pytest.raises(ConfigError, match=r"moe_capacity \(evaluated\) must be .*dropless, trained"):
        EngineConfig(moe_capacity="evaluated")


def test_kernels_are_one_kind_or_the_batch_invariant_ones():
    assert [EngineConfig(kernels=kind).form for kind in ("auto", "reference", "triton", "cpp")] == [
        None, "reference", "triton", "cpp",
    ]  # fmt: skip
    assert EngineConfig(deterministic=True).form == "invariant"
    with pytest.raises(ConfigError, match=r"kernels \(fast\) must be .*auto, reference, triton, cpp"):
        EngineConfig(kernels="fast")
    with pytest.raises(ConfigError, match=r"kernels \(cpp\) must be auto with deterministic=true"):
        EngineConfig(kernels="cpp", deterministic=True)


def test_sparse_tensor_cores_and_cuda_graphs_exclude_each_other():
    with pytest.raises(ConfigError, match=r"graph_buckets \(1, 2\) must be empty with semi_structured=true"):
        EngineConfig(semi_structured=True, graph_buckets=(1, 2))
