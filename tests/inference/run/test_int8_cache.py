"""Serving from int8 pages: close to exact ones, the same in any chunks, never mixed with them."""
# ruff: noqa: N802 (I4 is the name of a rule)

import pytest
import torch

from turnout import kernels
from turnout.inference.config import EngineConfig
from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.run.kv import plan_kv
from turnout.inference.run.runner import ModelRunner
from turnout.tests.inference.run.test_parity import DECODED, Server, text_of, trained

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class Int8Server(Server):
    """The forced texts of `Server` through int8 pages."""

    def __init__(self, model, budget):
        super().__init__(model, budget)
        config = EngineConfig(num_blocks=64, kv_dtype="int8")
        self.runner = ModelRunner(model, plan_kv(model.cfg, config, 256, model.embed.weight.dtype, 1 << 30))


def test_logits_are_close_to_those_of_exact_pages(make_model):
    """Of a dense model: a router may choose another expert over the last digit, which is then no small difference."""
    model, text = make_model(moe=None).double(), text_of(60 + DECODED, seed=1)
    exact, _ = trained(model, text)
    ((logits, _),) = Int8Server(model, 64).run([text])
    errors = [float((row - exact[at]).norm() / exact[at].norm()) for at, row in logits.items()]
    assert 1e-4 < max(errors) < 0.03


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("budget", [1, 7, 16])
def test_chunked_is_whole(make_model, budget, form):
    """In float64, where the rounding of sums flips no int8: the pages bit by bit, and the logits."""
    model, text = make_model("gshard").double(), text_of(33 + DECODED, seed=2)
    whole, parts = Int8Server(model, 64), Int8Server(model, budget)
    with kernels.using(form):
        ((expected, _),), ((found, _),) = whole.run([text]), parts.run([text])
    assert parts.chunks > whole.chunks == 0
    for name in ("keys", "values", "key_scales", "value_scales"):
        kept = [getattr(server.runner.cache, name)[:, 1:4] for server in (whole, parts)]
        assert torch.equal(*kept), name
    for at, row in expected.items():
        torch.testing.assert_close(found[at], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [pytest.param("rows", marks=pytest.mark.full), "invariant"])
def test_chunked_is_whole_bit_by_bit_with_invariant_kernels(make_model, form):
    """In float32: equal sums leave nothing that could tip an int8."""
    model, text = make_model("gshard"), text_of(33 + DECODED, seed=2)
    with kernels.using(form):
        ((expected, _),), ((found, _),) = Int8Server(model, 64).run([text]), Int8Server(model, 7).run([text])
    assert all(torch.equal(found[at], row) for at, row in expected.items())


def test_I4_blocks_of_one_precision_are_not_found_under_another(make_engine):
    request = Request(id="x", prompt_token_ids=[1, 2, 3], params=GREEDY)
    roots = set()
    for kv_dtype in ("auto", "int8"):
        roots.add(make_engine(kv_dtype=kv_dtype).blocks.prefix.root(request))
        request.root = b""
    assert len(roots) == 2


def test_a_prefix_hit_and_a_preemption_give_the_same_tokens(make_model, make_engine):
    """The engine's whole life on int8 pages, in float64."""
    model, prompts = make_model("gshard").double(), [text_of(30, seed=s) for s in range(4)]

    def complete(**config):
        engine = make_engine(model, kv_dtype="int8", **config)
        outputs = {}
        for _ in range(2):
            for i, prompt in enumerate(prompts):
                engine.add_request(str(i), prompt, GREEDY)
            while engine.has_unfinished:
                outputs |= {o.request_id: o.outputs[0].token_ids for o in engine.step() if o.finished}
        return outputs, engine.stats()

    plain, _ = complete(enable_prefix_caching=False)
    cached, hits = complete()
    scarce, stats = complete(num_blocks=7)
    assert plain == cached == scarce
    assert hits.prefix_hits > 0
    assert stats.preemptions > 0
