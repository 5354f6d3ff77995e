"""A model in eight or four bits is served by several ranks as by one: in deterministic mode with the very bits."""
# ruff: noqa: N802 (M3 is the name of a rule)

from collections.abc import Callable
from typing import Any

import pytest

from turnout.moe import save_model
from turnout.moe.config import AttentionConfig, LatentConfig
from turnout.moe.quantization_config import QuantizationConfig
from turnout.tests.helpers.rounded import rounded
from turnout.tests.inference.test_ranks import assert_close, both, moe_of

WIDE = {"width": 64, "head_dim": 16, "ffn_width": 128}
LATENT = AttentionConfig(latent=LatentConfig(rank=16, rope_dim=4, value_dim=16, query_rank=64))
HOW: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {"bits": 4, "group": 64},
    "int4, zero points": {"bits": 4, "group": 64, "zero": True},
    "w8a8": {"rows": "int8"},
    "fp8": {"kind": "float", "embedding": False},
}
MODELS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu"},
    "biases": {"attention": AttentionConfig(sinks=True, qkv_bias=True, output_bias=True)},
    "MQA": {"kv_heads": 1},
    "MLA": {"kv_heads": 4, "attention": LATENT},
}
LAYOUTS = [(2, {"ep": 2}), (2, {"tp": 2}), (4, {"tp": 2, "ep": 4}), (3, {"ep": 3}), (2, {})]


@pytest.fixture(scope="module")
def saved(make_model, byte_level, tmp_path_factory) -> Callable[..., str]:
    """The directory of a rounded model."""

    def save(how: str, **changes: Any) -> str:
        folder = tmp_path_factory.mktemp("model")
        byte_level._tokenizer.save(str(folder / "tokenizer.json"))
        kind = changes.get("activation", "swiglu")
        moe = moe_of("topk_softmax", width=64, expert_width=64, activation=kind, bias=kind == "relu")
        model = rounded(make_model(moe=moe, **(WIDE | changes)), QuantizationConfig(**HOW[how]))
        return str(save_model(folder / "model", model.cfg, model.state_dict(), folder))

    return save


def assert_same(path: str, world: int, sizes: dict[str, int]) -> None:
    """Every log-probability, to the bit; where one rank computed the same steps, also every logit."""
    told, expected = both(path, world, sizes, params={"logprobs": 5}, deterministic=True)
    assert told["logprobs"] == expected["logprobs"]
    if sizes.get("tp", 1) == world:
        assert_close(told, expected, bound=0.0)


@pytest.mark.parametrize(("how", "sizes"), [("int4, zero points", {"ep": 2}), ("w8a8", {"tp": 2, "ep": 2})], ids=str)
def test_M3_two_ranks_give_the_bits_of_one(saved, how, sizes):
    assert_same(saved(how), 2, sizes)


@pytest.mark.full
@pytest.mark.parametrize(("world", "sizes"), LAYOUTS, ids=str)
@pytest.mark.parametrize("how", HOW)
def test_M3_every_layout_gives_the_bits_of_one_rank_in_few_bits(saved, how, world, sizes):
    assert_same(saved(how), world, sizes)


@pytest.mark.full
@pytest.mark.parametrize(("world", "sizes"), LAYOUTS[:3], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_M3_so_does_every_form_of_model(saved, model, world, sizes):
    assert_same(saved("int8", **MODELS[model]), world, sizes)
    told, expected = both(saved("int8", **MODELS[model]), world, sizes)
    if sizes.get("tp", 1) == world:
        assert_close(told, expected)
