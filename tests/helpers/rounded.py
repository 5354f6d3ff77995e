"""A model in eight or four bits, without what `turnout compress` does besides.

model = rounded(make_model({}, width=64), QuantizationConfig(bits=4, group=64))
"""

from dataclasses import replace

from turnout.moe import Decoder
from turnout.moe.layers.quantized import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    matrices,
    round_to,
    stacks,
)
from turnout.moe.quantization_config import QuantizationConfig


def rounded(model: Decoder, how: QuantizationConfig) -> Decoder:
    """`model` itself, every matrix of it to nearest."""
    for name, linear in list(matrices(model)):
        model.set_submodule(name, QuantizedLinear(round_to(linear.weight, how), linear.bias))
    for name, experts in list(stacks(model)):
        both = (round_to(w, how) for w in (experts.w_in, experts.w_out.mT))
        model.set_submodule(name, QuantizedExperts(experts, *both))
    for name in ("embed", "head") if how.embedding else ():
        if (end := getattr(model, name)) is not None:
            setattr(model, name, QuantizedEmbedding(round_to(end.weight, how.of_vocabulary)))
    model.cfg = replace(model.cfg, quantization=how)
    model.tell_dtype()
    return model
