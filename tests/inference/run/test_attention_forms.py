"""Train = serve for every form of attention: packed at once, and through pages in chunks and token by token."""

import pytest
import torch

from turnout.moe import Decoder
from turnout.moe.config import AttentionConfig, RopeConfig
from turnout.tests.inference.conftest import build_model
from turnout.tests.inference.run.test_parity import DECODED, Server, text_of, trained

BOUND = {torch.float32: 1e-5, torch.float64: 1e-13}  # of the largest logit
YARN = RopeConfig(kind="yarn", factor=4.0, original_len=64, truncate=False)
FORMS = {
    "window": ({"window": 7}, {}),
    "windows in some layers, sinks, biases": (
        {"window": 5, "window_layers": (0, 2), "sinks": True, "qkv_bias": True, "output_bias": True}, {"rope": YARN},
    ),
    "norms of heads": ({"qk_norm": "head", "clip": 0.5}, {"rope": RopeConfig(kind="ntk", factor=2.0)}),
    "norms of the width": ({"qk_norm": "width", "qkv_bias": True}, {"rope": RopeConfig(kind="linear", factor=2.0)}),
    "biases by distance": ({"positions": "relative", "buckets": 8, "max_distance": 20, "scale": 0.3}, {}),
    "biases by distance, a window and sinks": (
        {"positions": "relative", "buckets": 8, "max_distance": 20, "window": 11, "sinks": True}, {},
    ),
}  # fmt: skip
QUICK = ("windows in some layers, sinks, biases", "norms of heads", "biases by distance")


def make(name: str, dtype: torch.dtype) -> Decoder:
    """Vectors are drawn too: a bias of zero shows nothing."""
    attention, more = FORMS[name]
    model = build_model(router="switch", attention=AttentionConfig(**attention), **more)
    generator = torch.Generator().manual_seed(3)
    for leaf, weight in model.named_parameters():
        if leaf.endswith((".bias", ".sinks", "_norm.weight", "relative.weight")) and ".attention" in f".{leaf}":
            weight.add_(torch.randn(weight.shape, generator=generator))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in FORMS])
@pytest.mark.parametrize("budget", [pytest.param(9), pytest.param(64, marks=pytest.mark.full)])
def test_pages_give_what_the_training_forward_gives(name, dtype, budget):
    model = make(name, dtype)
    texts = [text_of(length + DECODED, seed=length) for length in (1, 16, 37)]
    for text, (logits, experts) in zip(texts, Server(model, budget).run(texts), strict=True):
        truth, chosen = trained(model, text)
        assert sorted(logits) == list(range(len(text) - DECODED - 1, len(text)))
        for at, row in logits.items():
            assert float((row - truth[at]).abs().max()) <= BOUND[dtype] * float(truth.abs().max()), at
        for layer, ids in experts.items():
            assert all(torch.equal(found, chosen[layer][at]) for at, found in ids.items())


@pytest.mark.parametrize("name", ["windows in some layers, sinks, biases", "norms of heads"])
def test_a_form_changes_what_is_computed(name):
    plain, text = build_model(router="switch"), text_of(40, seed=1)
    assert float((trained(make(name, torch.float32), text)[0] - trained(plain, text)[0]).abs().max()) > 0.1
