"""What can be said of a compression: settings that say nothing of the method are refused, none is passed over."""

import pytest

from turnout import ConfigError
from turnout.moe.compress.config import CompressConfig


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"pattern": "2:4"}, r"pattern \(2:4\) goes with method=magnitude, wanda, sparsegpt, not int8"),
        ({"method": "wanda", "bits": 4}, r"bits \(4\) goes with method=gptq, sparsegpt, not wanda"),
        ({"method": "sparsegpt", "scale": "tensor"}, r"scale \(tensor\) goes with"),
        ({"method": "int8", "num_experts": 2}, r"num_experts \(2\) goes with method=experts, merge"),
        ({"method": "merge", "num_experts": 2, "by": "load"}, r"by \(load\) goes with"),
        ({"method": "int4", "scale": "channel"}, r"scale \(channel\) must be group for four bits: use group"),
        ({"method": "gptq", "group": 96}, r"group \(96\) must be a multiple of 64"),
        ({"method": "int8", "group": 128}, r"group \(128\) goes with scale=group"),
        ({"method": "gptq", "percentile": 98.0}, r"percentile \(98.0\) goes with clip=percentile"),
        ({"method": "fp8", "zero": True}, r"zero \(True\) goes with whole numbers"),
        ({"method": "fp8", "scale": "group"}, r"scale \(group\) must be a row's"),
        ({"method": "int8", "scale": "tensor", "zero": True}, r"zero \(True\) goes with .* a scale a row or group"),
        ({"method": "gptq", "bits": 3}, r"bits \(3\) must be 4 or 8"),
        ({"method": "magnitude", "pattern": "²:4"}, r"pattern \(²:4\) must be n:m"),
    ],
)
def test_what_says_nothing_of_the_method_or_can_not_be_is_refused_by_name(said, message):
    with pytest.raises(ConfigError, match=message):
        CompressConfig(**said)


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ({"method": "gptq"}, (4, 64)),
        ({"method": "gptq", "bits": 8}, (8, None)),
        ({"method": "int4", "group": 128}, (4, 128)),
        ({"method": "int8", "scale": "group"}, (8, 64)),
        ({"method": "sparsegpt"}, None),
        ({"method": "sparsegpt", "bits": 4, "pattern": "2:4"}, (4, 64)),
        ({"method": "sparsegpt", "bits": 8, "clip": "max"}, (8, None)),
    ],
)
def test_bits_and_groups_are_what_the_method_says(said, stored):
    found = CompressConfig(**said).quantization
    assert (found and (found.bits, found.group)) == stored
