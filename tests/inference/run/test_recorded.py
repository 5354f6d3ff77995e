"""Recorded decode steps give the bits of the steps that they replace: logits, tokens, statistics, pages of routing."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.run import recorded
from turnout.kernels.registry import using
from turnout.moe import MoEConfig
from turnout.moe.attention_config import AttentionConfig, LatentConfig
from turnout.moe.quantization_config import QuantizationConfig
from turnout.tests.helpers.rounded import rounded
from turnout.tests.inference.conftest import build_model
from turnout.tests.inference.run.test_attention_forms import make
from turnout.tests.inference.test_deterministic import deepseek

LATENT = {"kv_heads": 4, "attention": AttentionConfig(latent=LatentConfig(rank=12, rope_dim=4, value_dim=6))}


def mixture(router: str, **values) -> MoEConfig:
    return MoEConfig(width=32, expert_width=32, num_experts=8, top_k=2, router=router, init_scale=3.0, **values)


def gpt_oss():
    moe = mixture("gpt_oss", activation="swiglu_clamped", bias=True)
    return build_model(moe=moe, attention=AttentionConfig(sinks=True, qkv_bias=True, output_bias=True))


def few_bits(**how):
    """Every matrix in few bits, and the ends."""
    moe = replace(mixture("topk_softmax"), width=64, expert_width=64)
    model = build_model(moe=moe, width=64, head_dim=16, ffn_width=128).bfloat16()
    return rounded(model, QuantizationConfig(**how))


MODELS = {
    "dense": lambda: build_model(moe=None),
    "softmax": lambda: build_model(moe=mixture("topk_softmax")),
    "MLA": lambda: build_model("gshard", **LATENT),
    "norms of heads": lambda: make("norms of heads", torch.float32),
    "switch": build_model,
    "gshard": lambda: build_model("gshard"),
    "hash": lambda: build_model("hash"),
    "DeepSeek-V3": deepseek,
    "one head": lambda: build_model(moe=mixture("topk_softmax", shared_experts=1), kv_heads=1),
    "GPT-OSS": gpt_oss,
    "windows and sinks": lambda: make("windows in some layers, sinks, biases", torch.float32),
    "eight bits": lambda: few_bits(),
    "four bits, zero points": lambda: few_bits(bits=4, group=64, zero=True),
    "eight bits, rows too": lambda: few_bits(rows="int8"),
    "norms of the width": lambda: make("norms of the width", torch.float32),
}
VOID = ("GPT-OSS",)
"""Experts with biases are given sorted rows, and how many of them is asked in each step."""
QUICK = ("softmax", "MLA", "eight bits")
names = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in MODELS])


def serve(engine: Engine, requests: int = 7, *, records: bool) -> tuple[list, list[torch.Tensor], list[torch.Tensor]]:
    """Tokens and log-probabilities of requests that come and go, the logits of each step, statistics and pages."""
    engine.runner.records = records
    steps, forward = [], engine.runner.forward

    def listen(plan):
        batch, logits_RV = forward(plan)
        steps.append(logits_RV.clone())
        return batch, logits_RV

    engine.runner.forward = listen
    rng, waiting, seen = random.Random(0), list(range(requests)), {}
    common = [rng.randrange(1, 320) for _ in range(20)]
    for turn in itertools.count():
        if not waiting and not engine.has_unfinished:
            break
        if waiting and turn % 5 == 0:
            i = waiting.pop(0)
            prompt = common * (i % 2) + [rng.randrange(1, 320) for _ in range(rng.choice([1, 5, 17]))]
            chosen = {"temperature": 1.0, "seed": i} if i % 3 else {"temperature": 0}
            params = SamplingParams(max_tokens=14 + 3 * i, ignore_eos=True, logprobs=2, routed_experts=bool(
                engine.runner.pages.layers), **chosen)  # fmt: skip
            engine.add_request(str(i), prompt, params)
        for output in engine.step():
            seen[output.request_id] = output
    engine.runner.forward = forward
    told = [(c.token_ids, c.logprobs, c.finish_reason) for _, o in sorted(seen.items()) for c in o.outputs]
    routed = [torch.tensor(c.routed_experts) for _, o in sorted(seen.items()) for c in o.outputs
              if c.routed_experts is not None]  # fmt: skip
    return told, [*steps, engine.runner.routing.tensor.clone()], routed


def compare(model, make_engine, **config) -> list[recorded._Entry]:
    """What the recordings of an engine were, once it has given what one without them gives."""
    found = serve(engine := make_engine(model, **config), records=True)
    wanted = serve(make_engine(model, **config), records=False)
    assert found[0] == wanted[0]
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return list(engine.runner._recorded.entries.values())


@names
def test_requests_that_come_and_go_get_the_bits_of_steps_from_python(make_engine, name):
    entries = compare(MODELS[name]().bfloat16(), make_engine, enable_prefix_caching=True)
    assert sum(entry.steps > 5 for entry in entries) > 1
    assert all(entry.proven == (name not in VOID) for entry in entries if entry.steps > 2)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"kv_dtype": "int8"}, id="int8"),
        pytest.param({"num_blocks": 14}, id="preemption"),
        pytest.param({"deterministic": True}, id="deterministic", marks=pytest.mark.full),
        pytest.param({"kernels": "cpp"}, id="cpp", marks=pytest.mark.full),
        pytest.param({"overlap": True}, id="overlap", marks=pytest.mark.full),
    ],
)
def test_so_they_do_under_other_settings(make_engine, config):
    entries = compare(MODELS["softmax"]().bfloat16(), make_engine, **config)
    assert sum(entry.proven for entry in entries) > 1


def test_what_reads_numbers_outside_of_the_kernels_is_not_recorded(make_engine):
    model = MODELS["softmax"]().bfloat16()
    for form in ("reference", "torch"):
        with using(form):
            entries = compare(model, make_engine)
        assert len(entries) > 2
        assert not any(entry.recorded for entry in entries)


def test_a_capacity_and_filled_up_buckets_stay_as_they_are(make_engine):
    model = build_model(moe=mixture("topk_softmax", eval_capacity_factor=1.0, capacity_tokens=64)).bfloat16()
    assert compare(model, make_engine, moe_capacity="trained") == []
    assert compare(model, make_engine, graph_buckets=(8,)) == []


def test_another_weight_forgets_the_recordings(make_engine):
    model = MODELS["softmax"]().bfloat16()
    engine = make_engine(model)
    before = serve(engine, records=True)[0]
    kept = engine.runner._recorded
    old = list(kept.entries.values())
    assert any(entry.proven for entry in old)
    with torch.no_grad():
        model.norm.weight.mul_(2)  # in place: it is read where it lies
    serve(engine, records=True)
    assert next(iter(kept.entries.values())) in old
    model.norm.weight = torch.nn.Parameter(model.norm.weight * -1, requires_grad=False)
    after = serve(engine, records=True)[0]
    assert not any(entry in old for entry in kept.entries.values())
    fresh = serve(make_engine(model), records=False)[0]
    assert after != before
    assert [a[0] for a in after] == [a[0] for a in fresh]


def test_who_listens_to_a_layer_hears_every_step(make_engine):
    model = MODELS["softmax"]().bfloat16()
    engine, heard = make_engine(model), []
    wanted = serve(engine, records=True)
    handle = model.blocks[1].register_forward_hook(lambda *_: heard.append(1))
    found = serve(engine, records=True)
    handle.remove()
    assert [a[0] for a in found[0]] == [a[0] for a in wanted[0]]
    assert len(heard) >= len(found[1]) - 1


def test_a_recording_that_gives_other_numbers_is_dropped(make_engine, monkeypatch, caplog):
    play = recorded._Recorded.play
    monkeypatch.setattr(recorded._Recorded, "play", lambda self, batch: play(self, batch) + 1)
    entries = compare(MODELS["softmax"]().bfloat16(), make_engine)
    assert not any(entry.proven or entry.recorded for entry in entries)
    assert "gave other numbers" in caplog.text


def test_a_thousand_steps_take_no_more_memory(make_engine):
    engine = make_engine(MODELS["softmax"]().bfloat16(), num_blocks=128)
    sizes = []
    for i in range(5):
        greedy = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        engine.add_request(str(i), [1, 2, 3], greedy)
        while engine.has_unfinished:
            engine.step()
        arena = engine.runner._recorded._arena
        sizes.append((arena.bytes, len(engine.runner._recorded.entries)))
    assert sizes == [(1 << 20, 1)] * 5
