"""`routed_experts`: every computed token's experts, whatever was cached, cut, preempted, forked or aborted meanwhile.

The expected rows are those of one forward pass of the trainer over prompt and completion.
"""
# ruff: noqa: N802 (M6 is the name of a rule)

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from turnout import LLM, RequestError
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.outputs import CompletionOutput, RequestOutput
from turnout.moe import Decoder, MoEConfig, RouteContext, VarlenContext
from turnout.moe.attention_config import AttentionConfig, EncoderConfig

TIGHT = {"eval_capacity_factor": 0.35, "min_capacity": 1, "capacity_tokens": 24, "init_scale": 3.0}
ROUTERS = {
    "switch": {},
    "gshard": {},
    "topk_softmax": {"top_k": 2},
    "deepseek_v3": {"top_k": 2, "expert_groups": 2, "top_groups": 1},
}
MODES = ["dropless", "trained"]


@pytest.fixture(scope="module")
def tight(make_model) -> dict[str, Decoder]:
    return {
        name: make_model(moe=MoEConfig(width=32, expert_width=32, num_experts=4, router=name, **TIGHT, **more))
        for name, more in ROUTERS.items()
    }


def asking(**settings) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 12, "routed_experts": True} | settings))


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(1, 321, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def went_alone(model: Decoder, text: Sequence[int], mode: str) -> np.ndarray:
    """[tokens, L, K]: where the trainer's evaluation sends each token; −1 − expert where nowhere."""
    ids, ends = torch.tensor(text), torch.tensor([0, len(text)])
    context = VarlenContext(ends, RouteContext(cu_groups=ends, token_ids_T=ids, dropless=mode == "dropless"))
    model(ids, torch.arange(len(text)), context)
    went = [torch.where(r.kept_TK, r.ids_TK, -1 - r.ids_TK) for r in context.routings.values()]
    return torch.stack(went, 1).numpy()


def run(engine: Engine, seen: dict[str, list[RequestOutput]] | None = None) -> dict[str, list[RequestOutput]]:
    """All outputs of every request."""
    seen = {} if seen is None else seen
    while engine.has_unfinished:
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    return seen


def assert_rows(model: Decoder, mode: str, prompt: Sequence[int], choice: CompletionOutput) -> None:
    rows, text = choice.routed_experts, [*prompt, *choice.token_ids]
    assert rows.shape == (len(text) - 1, len(model.cfg.moe_layers), model.cfg.moe.top_k)
    assert rows.dtype == np.int16
    assert np.array_equal(rows, went_alone(model, text[:-1], mode))
    assert (rows < 0).any() == (mode == "trained"), "the capacity is tight"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("budget", [3, 64])
def test_M6_rows_are_right_through_chunks_hits_and_preemption(tight, make_engine, router, mode, budget):
    model = tight[router]
    engine = make_engine(
        model,
        moe_capacity=mode,
        max_num_batched_tokens=budget,
        max_num_seqs=min(budget, 4),
        num_blocks=16,
        block_size=4,
    )
    shared = prompt_of(18, seed=0)
    prompts = {str(i): shared[: 5 * i + 3] + prompt_of(18 - 4 * i, seed=i) for i in range(1, 4)} | {"0": shared}
    seen: dict[str, list[RequestOutput]] = {}
    engine.add_request("first", shared, asking())
    run(engine, seen)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, asking())
    run(engine, seen)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    for name, prompt in ({"first": shared} | prompts).items():
        assert_rows(model, mode, prompt, seen[name][-1].outputs[0])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_M6_blocks_that_a_window_gives_back_take_no_row_and_no_counter_with_them(
    make_model, make_engine, mode, overlap
):
    moe = MoEConfig(width=32, expert_width=32, num_experts=4, router="gshard", **TIGHT)
    model = make_model(moe=moe, attention=AttentionConfig(window=6))
    engine = make_engine(
        model, moe_capacity=mode, block_size=4, num_blocks=16, max_num_batched_tokens=9, overlap=overlap
    )
    prompts = {str(i): prompt_of(20 + 3 * i, seed=i % 2) for i in range(4)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, asking(max_tokens=30, ignore_eos=True))
    given_back, seen = 0, {}
    while engine.has_unfinished:
        for output in engine.step():
            seen[output.request_id] = output.outputs[0]
        given_back += sum(request.num_dropped_blocks for request in engine.scheduler.running)
    assert given_back > 0
    for name, prompt in prompts.items():
        assert_rows(model, mode, prompt, seen[name])


@pytest.mark.parametrize("mode", MODES)
def test_M6_a_reported_row_is_not_reported_again_nor_changed(tight, make_engine, mode):
    engine = make_engine(tight["gshard"], moe_capacity=mode, num_blocks=16, block_size=4)
    prompts = {str(i): prompt_of(17, seed=i) for i in range(4)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, asking())
    seen = run(engine)
    assert engine.stats().preemptions > 0
    for name, outputs in seen.items():
        last = outputs[-1].outputs[0].routed_experts
        for output in outputs:
            (choice,) = output.outputs
            assert len(choice.routed_experts) == len(prompts[name]) + len(choice.token_ids) - 1
            assert np.array_equal(choice.routed_experts, last[: len(choice.routed_experts)])
        with pytest.raises(ValueError, match="read-only"):
            last[0] = 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [8, 9, 14])
@pytest.mark.parametrize("max_tokens", [1, 10])
def test_M6_choices_of_one_prompt_have_rows_of_their_own(tight, make_engine, mode, length, max_tokens):
    model, prompt = tight["topk_softmax"], prompt_of(length, seed=3)
    engine = make_engine(model, moe_capacity=mode, block_size=4)
    engine.add_request("x", prompt, asking(n=3, temperature=2.0, seed=1, max_tokens=max_tokens, ignore_eos=True))
    choices = run(engine)["x"][-1].outputs
    assert len({tuple(choice.token_ids) for choice in choices}) == 3 or max_tokens == 1
    for choice in choices:
        text = [*prompt, *choice.token_ids]
        assert np.array_equal(choice.routed_experts, went_alone(model, text[:-1], mode))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_M2_a_result_is_its_own_beside_mates_that_fill_every_expert_and_are_aborted(tight, make_engine, mode, overlap):
    model, prompt = tight["switch"], prompt_of(20, seed=5)
    alone = make_engine(model, moe_capacity=mode, block_size=4)
    alone.add_request("x", prompt, asking())
    expected = run(alone)["x"][-1].outputs[0]
    engine = make_engine(model, moe_capacity=mode, block_size=4, max_num_batched_tokens=48, overlap=overlap)
    for i in range(5):
        engine.add_request(f"mate {i}", prompt_of(8, seed=10 + i), asking(max_tokens=30))
    engine.add_request("x", prompt, asking())
    seen: dict[str, list[RequestOutput]] = {}
    for step in range(5):
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
        assert engine.stats().running == 6 - step, "they run beside each other"
        engine.abort(f"mate {step}")
    run(engine, seen)
    (choice,) = seen["x"][-1].outputs
    assert choice.token_ids == expected.token_ids
    assert np.array_equal(choice.routed_experts, expected.routed_experts)
    assert_rows(model, mode, prompt, choice)


@torch.inference_mode()
def plainly(model: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens of the trainer's evaluation, the whole text computed anew for each."""
    text = list(prompt)
    for _ in range(count):
        ids, ends = torch.tensor(text), torch.tensor([0, len(text)])
        logits = model(ids, torch.arange(len(text)), VarlenContext(ends, RouteContext(cu_groups=ends, token_ids_T=ids)))
        text.append(int(logits[-1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("router", ROUTERS)
def test_M7_trained_capacity_generates_what_the_trainer_s_evaluation_predicts(tight, make_engine, router):
    """Here the drops decide: without them the text is another."""
    model, prompts = tight[router], {str(i): prompt_of(18 + i, seed=20 + i) for i in range(3)}
    texts = {}
    for mode in MODES:
        engine = make_engine(model, moe_capacity=mode, block_size=4, max_num_batched_tokens=11)
        for name, prompt in prompts.items():
            engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
        texts[mode] = {name: outputs[-1].outputs[0].token_ids for name, outputs in run(engine).items()}
    assert texts["trained"] == {name: plainly(model, prompt, 10) for name, prompt in prompts.items()}
    assert texts["trained"] != texts["dropless"]


WAYS = {
    "chunked": {"max_num_batched_tokens": 5, "max_num_seqs": 5},
    "preempted": {"num_blocks": 16},
    "uncached": {"enable_prefix_caching": False},
    "in buckets": {"graph_buckets": (2, 4, 8)},
    "a step ahead": {"overlap": True},
    "static": {"batching": "static", "max_num_seqs": 3},
}


def exactly(output: RequestOutput) -> list[tuple[list[int], list[dict[int, float]], bytes]]:
    return [(choice.token_ids, choice.logprobs, choice.routed_experts.tobytes()) for choice in output.outputs]


@pytest.mark.parametrize(
    "router", [pytest.param(name, marks=() if name == "gshard" else pytest.mark.full) for name in ROUTERS]
)
@pytest.mark.parametrize("mode", MODES)
def test_M2_deterministic_results_are_the_same_bits_in_every_way_of_serving(tight, make_engine, router, mode):
    """Tokens, log-probabilities and experts, each request alone and then all of them in each way."""
    settings = {"moe_capacity": mode, "block_size": 4, "deterministic": True}
    shared = prompt_of(14, seed=0)
    work = {}
    for i in range(4):
        params = asking(logprobs=3, n=1 + i % 2, temperature=i % 2, seed=i)
        work[str(i)] = shared[: 6 * i] + prompt_of(17 - 5 * i, seed=i), params
    alone = {}
    for name, request in work.items():
        engine = make_engine(tight[router], **settings)
        engine.add_request(name, *request)
        alone[name] = exactly(run(engine)[name][-1])
    seen = dict.fromkeys(("preemptions", "prefix_hits"), 0)
    for way, changes in WAYS.items():
        engine = make_engine(tight[router], **(settings | changes))
        for name, request in work.items():
            engine.add_request(name, *request)
        found = run(engine)
        for name in work:
            assert exactly(found[name][-1]) == alone[name], way
        seen = {name: count + getattr(engine.stats(), name) for name, count in seen.items()}
    assert all(seen.values()), seen


@pytest.mark.parametrize("buckets", [(), (3, 8)])
@pytest.mark.parametrize("router", ["switch", "topk_softmax"])
def test_M10_counters_are_the_reported_rows_exactly(tight, make_engine, router, buckets):
    """Rows that fill a bucket up count nowhere."""
    model = tight[router]
    engine = make_engine(model, enable_prefix_caching=False, graph_buckets=buckets)
    for i in range(5):
        engine.add_request(str(i), prompt_of(7 * i + 1, seed=i), asking(max_tokens=3 * i + 1, ignore_eos=True))
    rows = np.concatenate([outputs[-1].outputs[0].routed_experts for outputs in run(engine).values()])
    stats = engine.stats()
    assert len(rows) == stats.computed_tokens
    expected = [np.bincount(rows[:, layer].ravel(), minlength=4).tolist() for layer in range(rows.shape[1])]
    assert stats.routing.counts() == expected
    assert sum(map(sum, expected)) == stats.computed_tokens * model.cfg.moe.top_k * len(model.cfg.moe_layers)


def test_the_share_of_drops_is_that_of_the_reported_rows(tight, make_engine):
    engine = make_engine(tight["topk_softmax"], moe_capacity="trained", enable_prefix_caching=False)
    for i in range(4):
        engine.add_request(str(i), prompt_of(9 * i + 2, seed=i), asking())
    rows = np.concatenate([outputs[-1].outputs[0].routed_experts for outputs in run(engine).values()])
    told = engine.stats().routing.fields()
    dropped = (rows < 0).mean(axis=(0, 2)).tolist()
    assert told["layer_drop_fraction"] == pytest.approx(dropped)
    assert told["drop_fraction"] > 0


@torch.inference_mode()
def read_and_write(model: Decoder, source: Sequence[int], output: Sequence[int], mode: str) -> tuple[int, np.ndarray]:
    """The trainer's evaluation of an encoder-decoder: the greedy next token, and where the decoder's tokens went."""
    borders, own, dropless = torch.tensor([0, len(source)]), torch.tensor([0, len(output)]), mode == "dropless"
    reading = VarlenContext(borders, RouteContext(cu_groups=borders, dropless=dropless))
    memory = model.encode(torch.tensor(source), torch.arange(len(source)), reading)
    route = RouteContext(cu_groups=own, dropless=dropless)
    context = VarlenContext(own, route, memory=memory, cu_memory_B1=borders)
    logits = model(torch.tensor(output), torch.arange(len(output)), context)
    assert all(r.kept_TK.all() for r in reading.routings.values()) == dropless, "the capacity is tight"
    went = [torch.where(r.kept_TK, r.ids_TK, -1 - r.ids_TK) for r in context.routings.values()]
    return int(logits[-1].argmax()), torch.stack(went, 1).numpy()


@pytest.mark.parametrize("mode", MODES)
def test_M6_an_encoder_decoder_reports_its_decoder(make_model, make_engine, mode):
    model = make_model(
        layers=2, kv_heads=4, seed=3, activation="relu", attention=AttentionConfig(positions="relative"),
        encoder=EncoderConfig(layers=2, start_token_id=5, sparse_layers=(1,)),
        moe=MoEConfig(width=32, expert_width=32, num_experts=4, router="switch", **TIGHT),
    )  # fmt: skip
    engine = make_engine(model, moe_capacity=mode, block_size=4, num_blocks=24)
    sources = {str(i): prompt_of(30 + i, seed=i) for i in range(3)}
    for name, source in sources.items():
        engine.add_request(name, source, asking(max_tokens=20, ignore_eos=True))
    seen = run(engine)
    assert engine.stats().preemptions > 0
    for name, source in sources.items():
        (choice,) = seen[name][-1].outputs
        text = [5]
        for token in choice.token_ids:
            best, rows = read_and_write(model, source, text, mode)
            assert token == best
            text.append(token)
        assert np.array_equal(choice.routed_experts, rows)
        assert len(rows) == 20


def test_nothing_is_reported_unless_asked_for(make_engine):
    engine = make_engine()
    engine.add_request("x", [1, 2, 3], SamplingParams(max_tokens=4))
    assert all(output.outputs[0].routed_experts is None for output in run(engine)["x"])


def test_a_request_that_ends_before_it_starts_has_no_rows(make_engine):
    engine = make_engine()
    engine.add_request("x", [1, 2, 3], asking())
    assert engine.abort("x").outputs[0].routed_experts.shape == (0, 2, 1)


def test_a_dense_model_has_no_experts_to_report(make_model, make_engine):
    engine = make_engine(make_model(router="switch", moe=None))
    with pytest.raises(RequestError, match=r"routed_experts \(True\) needs a decoder with experts") as error:
        engine.add_request("x", [1], asking())
    assert error.value.param == "routed_experts"


def test_offline_users_get_them_from_a_checkpoint(model_dir, model):
    (result,) = LLM(model_dir).generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=5, routed_experts=True))
    assert_rows(model, "dropless", [5, 6, 7], result.outputs[0])
