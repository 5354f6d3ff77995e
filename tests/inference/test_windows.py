"""Models whose every layer has a window: what is given back changes no token, and a long text needs few blocks."""

import itertools

import pytest

from turnout.inference.core.sampling import SamplingParams
from turnout.inference.pool import common_window
from turnout.moe.config import AttentionConfig, LatentConfig

WINDOW = AttentionConfig(window=20)
LATENT = AttentionConfig(window=20, latent=LatentConfig(rank=12, rope_dim=4, value_dim=6))
FORMS = {"heads": {"attention": WINDOW}, "latents": {"attention": LATENT, "kv_heads": 4}}


def complete(engine, requests):
    found = {}
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    while engine.has_unfinished:
        found |= {output.request_id: output for output in engine.step() if output.finished}
    return [[(choice.token_ids, routes(choice)) for choice in found[str(i)].outputs] for i in range(len(requests))]


def routes(choice):
    return None if choice.routed_experts is None else choice.routed_experts.tolist()


def work():
    prompts = [[1 + (7 * i + j) % 300 for j in range(length)] for i, length in enumerate((3, 16, 17, 40, 70))]
    params = [
        SamplingParams(max_tokens=40, seed=i, n=1 + i % 2, ignore_eos=True, routed_experts=True) for i in range(5)
    ]
    return list(zip(prompts, params, strict=True)) * 2


def test_a_window_is_common_when_every_layer_has_one(make_model):
    def of(**attention):
        return common_window(make_model(attention=AttentionConfig(**attention)).cfg)

    assert of(window=20) == 20
    assert of(window=20, window_layers=(0, 1, 2, 3)) == 20
    assert of(window=20, window_layers=(0, 2)) is None
    assert of() is None


@pytest.mark.parametrize("form", [pytest.param(f, marks=() if f == "heads" else pytest.mark.full) for f in FORMS])
@pytest.mark.parametrize(("overlap", "caching"), [*itertools.product((False, True), repeat=2)])
def test_tokens_and_experts_are_the_same_with_and_without_blocks_given_back(
    make_model, make_engine, form, overlap, caching
):
    """In float64, because the shapes of a step decide the last bits; the pool is scarce, so blocks change hands."""
    model = make_model("gshard", **FORMS[form]).double()
    whole = make_engine(model, enable_prefix_caching=False)
    whole.blocks._window = None
    expected = complete(whole, work())
    engine = make_engine(
        model, num_blocks=24, overlap=overlap, enable_prefix_caching=caching, max_num_batched_tokens=24
    )
    assert engine.blocks._window == 20
    assert complete(engine, work()) == expected


def test_a_long_text_holds_the_blocks_of_its_window(make_model, make_engine):
    engine = make_engine(make_model(attention=WINDOW))
    engine.add_request("long", [1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, round(engine.stats().usage * 63))
    assert most == 3, "20 tokens span at most 3 blocks of 16, where 203 tokens would take 13"
