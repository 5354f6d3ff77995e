"""deterministic=true: the bits of a request are its own (S0), and those of the training forward (TS).

A `Server` forces texts through scheduler, pages and model in chunks of its budget, then token by token; an engine
samples at temperature 1 with preemption, prefix hits and aborts. Bits are compared with `==`, nothing is near.
"""

# ruff: noqa: N802 (S0 and TS are names of rules)

import math

import pytest
import torch

from turnout import ConfigError
from turnout.inference.config import EngineConfig
from turnout.inference.engine import Engine
from turnout.kernels.cpp import build
from turnout.kernels.registry import using
from turnout.moe import Decoder, MoEConfig
from turnout.moe.config import AttentionConfig, LatentConfig
from turnout.tests.inference.conftest import build_model
from turnout.tests.inference.run.test_attention_forms import FORMS, make
from turnout.tests.inference.run.test_parity import BORDERS, DECODED, Server, text_of, trained
from turnout.tests.inference.test_engine import complete, mixed, tokens

LATENT = AttentionConfig(latent=LatentConfig(rank=12, rope_dim=4, value_dim=6, query_rank=20))


def deepseek() -> Decoder:
    """Latent attention, sigmoid scores in groups, a gated shared expert, widths that no vector divides."""
    moe = MoEConfig(
        width=32, expert_width=27, num_experts=6, top_k=2, router="deepseek_v3", init_scale=3.0, shared_experts=1,
        shared_gate=True, expert_groups=3, top_groups=2,
    )  # fmt: skip
    return build_model(moe=moe, kv_heads=4, attention=LATENT)


MODELS = {
    "dense": lambda: build_model(moe=None),
    "top 2": lambda: build_model("gshard"),
    "DeepSeek": deepseek,
    "windows and sinks": lambda: make("windows in some layers, sinks, biases", torch.float32),
    **{name: (lambda name=name: make(name, torch.float32)) for name in FORMS if "sinks, biases" not in name},
}
QUICK = ("dense", "top 2", "DeepSeek", "windows and sinks")
TIGHT = MoEConfig(
    width=32, expert_width=32, num_experts=4, top_k=2, router="topk_softmax", init_scale=3.0, eval_capacity_factor=0.35,
    min_capacity=1, capacity_tokens=24,
)  # fmt: skip
models = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in MODELS]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def different(served, expected) -> int:
    """Rows of logits, and chosen experts, that are not the same."""
    (logits, experts), (wanted, chosen) = served, expected
    rows = sum(not torch.equal(row, wanted[at]) for at, row in logits.items())
    ids = ((layer, at, ids_K) for layer, by_position in experts.items() for at, ids_K in by_position.items())
    return rows + sum(not torch.equal(ids_K, chosen[layer][at]) for layer, at, ids_K in ids)


def served(model: Decoder, texts, budget: int):
    server = Server(model, budget)
    return server.run(texts), server.chunks


@models
@dtypes
def test_S0_chunks_in_company_give_the_bits_of_whole_prompts_alone(name, dtype):
    model = MODELS[name]().to(dtype)
    texts = [text_of(length + DECODED, seed=length) for length in BORDERS]
    with using("invariant"):
        together, chunks = served(model, texts, budget=7)
        assert chunks > 0
        for text, found in zip(texts, together, strict=True):
            assert different(found, served(model, [text], budget=256)[0][0]) == 0


@pytest.mark.full  # another CPU's library may keep it
def test_S0_the_librarys_kernels_do_not_keep_it():
    """The mutant of the test above: without our kernels its bits differ, so that it is known to see them."""
    model, texts = build_model("gshard"), [text_of(length + DECODED, seed=length) for length in BORDERS]
    together, _ = served(model, texts, budget=7)
    pairs = [(found, served(model, [text], budget=256)[0][0]) for text, found in zip(texts, together, strict=True)]
    assert sum(different(*pair) for pair in pairs) > len(texts)


@models
@dtypes
@pytest.mark.parametrize("budget", [9, pytest.param(256, marks=pytest.mark.full)])
def test_TS_prefill_and_decode_give_the_bits_and_experts_of_the_training_forward(name, dtype, budget):
    model = MODELS[name]().to(dtype)
    texts = [text_of(length + DECODED, seed=length) for length in (1, 17, 33)]
    with using("invariant"):
        for text, found in zip(texts, served(model, texts, budget)[0], strict=True):
            assert sorted(found[0]) == list(range(len(text) - DECODED - 1, len(text)))
            assert different(found, trained(model, text)) == 0


def exact(output) -> list:
    """All that a choice says, numbers as they are."""
    return [(choice.token_ids, choice.text, choice.finish_reason, choice.logprobs) for choice in output.outputs]


@pytest.mark.parametrize(
    "name", ["top 2", pytest.param("DeepSeek", marks=pytest.mark.full), pytest.param("dense", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("kv_dtype", ["auto", pytest.param("int8", marks=pytest.mark.full)])
def test_S0_sampled_requests_do_not_feel_preemption_prefixes_or_aborted_mates(make_engine, name, dtype, kv_dtype):
    model, work = MODELS[name]().to(dtype), mixed(temperature=1.0)[:14] + mixed(temperature=1.0, n=2)[14:20]
    if kv_dtype == "int8" and model.cfg.attention.latent is not None:
        with pytest.raises(ConfigError):
            make_engine(model, kv_dtype=kv_dtype, deterministic=True)
        return
    own = {"deterministic": True, "kv_dtype": kv_dtype}
    together = make_engine(model, num_blocks=18, max_num_seqs=8, max_num_batched_tokens=24, overlap=True, **own)
    alone = make_engine(model, enable_prefix_caching=False, **own)
    for i, request in enumerate(work):
        together.add_request(str(i), *request)
        together.add_request(f"mate {i}", *request)
    outputs, steps, aborted = {}, 0, 0
    while together.has_unfinished:
        for output in together.step():
            outputs[output.request_id] = output
        steps += 1
        if steps % 3 == 0 and steps // 3 <= len(work):
            aborted += together.abort(f"mate {steps // 3 - 1}") is not None
    stats = together.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert aborted > 5
    for i, request in enumerate(work):
        (expected,) = complete(alone, [request])
        assert exact(outputs[str(i)]) == exact(expected), i
    assert len({tuple(tokens(outputs[str(i)])[0]) for i in range(len(work))}) > 10


def test_S0_requests_that_drop_what_the_trainer_drops_do_not_feel_their_mates(make_engine):
    model, work = build_model(moe=TIGHT), mixed(temperature=1.0)[:10]
    own = {"deterministic": True, "moe_capacity": "trained"}
    together = make_engine(model, num_blocks=18, max_num_batched_tokens=24, **own)
    alone = make_engine(model, enable_prefix_caching=False, **own)
    for request, output in zip(work, complete(together, work), strict=True):
        assert exact(output) == exact(complete(alone, [request])[0])


def test_S0_prompt_logprobs_are_the_same_bits_in_chunks(make_engine):
    """Scored in chunks beside others, and whole."""
    from turnout.inference.core.sampling import SamplingParams

    prompt, params = text_of(61, seed=1), SamplingParams(max_tokens=1, prompt_logprobs=2)
    small = make_engine(deterministic=True, max_num_batched_tokens=11, max_num_seqs=4, enable_prefix_caching=False)
    large = make_engine(deterministic=True, max_num_batched_tokens=64, enable_prefix_caching=False)
    small.add_request("mate", text_of(30, seed=2), SamplingParams(max_tokens=8))
    found, expected = (complete(engine, [(prompt, params)])[0].prompt_logprobs for engine in (small, large))
    assert found == expected
    assert len(found) == 61


@pytest.mark.full
def test_S0_encoder_decoder_requests_do_not_feel_their_mates(t5, make_engine):
    work = mixed(temperature=1.0)[:10]
    together = make_engine(t5, deterministic=True, num_blocks=24, max_num_batched_tokens=100)
    alone = make_engine(t5, deterministic=True, max_num_batched_tokens=100)
    for request, output in zip(work, complete(together, work), strict=True):
        assert exact(output) == exact(complete(alone, [request])[0])


def test_S0_holds_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    build.library.cache_clear()
    try:
        model, texts = deepseek(), [text_of(length + DECODED, seed=length) for length in (1, 4, 17)]
        with using("invariant"):
            for text, found in zip(texts, served(model, texts, budget=5)[0], strict=True):
                assert different(found, served(model, [text], budget=64)[0][0]) == 0
                assert different(found, trained(model, text)) == 0
    finally:
        build.library.cache_clear()


def test_fast_and_deterministic_engines_agree_within_rounding(make_engine):
    work = mixed(temperature=0)[:6]
    fast, slow = (complete(make_engine(deterministic=exact), work) for exact in (False, True))
    for one, other in zip(fast, slow, strict=True):
        assert tokens(one) == tokens(other)
        for a, b in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert all(math.isclose(a[token], b[token], abs_tol=1e-4) for token in a)


def test_kernels_are_compiled_before_the_engine_is_ready(make_engine):
    build.library.cache_clear()
    make_engine(kernels="reference")
    assert build.library.cache_info().currsize == 0
    for settings in ({}, {"kernels": "cpp"}, {"deterministic": True}):
        build.library.cache_clear()
        make_engine(**settings)
        assert build.library.cache_info().currsize == 1


def test_a_model_that_is_not_on_a_cpu_is_refused(model, byte_level):
    with pytest.raises(ConfigError, match=r"deterministic \(true\).*meta.*device=cpu"):
        Engine(build_model().to("meta"), byte_level, EngineConfig(deterministic=True))


@pytest.mark.parametrize(
    ("form", "settings"),
    [("invariant", {"deterministic": True}), ("cpp", {"kernels": "cpp"}), ("reference", {"kernels": "reference"})],
)
def test_the_engine_runs_what_it_is_told(form, settings, make_engine):
    """The bits of an engine are those of the forms that it was told to take."""
    work, other = mixed(temperature=0)[:1], "reference" if form != "reference" else "cpp"
    told, bits = make_engine(**settings), []
    for kind in (form, other):
        with using(kind):
            bits.append(exact(complete(make_engine(), work)[0]))
    assert exact(complete(told, work)[0]) == bits[0] != bits[1]


def test_kernels_that_can_not_run_here_are_refused(make_engine, byte_level, monkeypatch):
    with pytest.raises(ConfigError, match=r"kernels \(triton\) need a GPU.*on cpu: leave kernels at auto"):
        make_engine(kernels="triton")
    with pytest.raises(ConfigError, match=r"kernels \(cpp\) are for a CPU only.*on meta: leave"):
        Engine(build_model().to("meta"), byte_level, EngineConfig(kernels="cpp"))
    monkeypatch.setattr("turnout.inference.machine.library", lambda: None)
    with pytest.raises(ConfigError, match=r"kernels \(cpp\) can not be built here.*leave"):
        make_engine(kernels="cpp")
