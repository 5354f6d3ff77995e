"""Encoder-decoders: a request's prompt goes through the encoder once, and its output is that of a plain loop over the
model, whatever else runs, waits, is preempted or aborted beside it."""
# ruff: noqa: N802 (O12 is the name of a rule)

import random

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from turnout import LLM, RequestError
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.outputs import RequestOutput
from turnout.moe import Decoder, RouteContext, VarlenContext
from turnout.moe.models.store import load_model

LENGTHS = (1, 15, 16, 17, 40)
GREEDY = SamplingParams(temperature=0, max_tokens=32)
SEEDED = SamplingParams(temperature=1.0, seed=8, max_tokens=20, n=3, logprobs=1)


def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(1, 321) for _ in range(length)] for length in LENGTHS]


@torch.inference_mode()
def plainly(model: Decoder, prompt: list[int], count: int = 32) -> list[int]:
    """Greedy tokens, the whole sequence computed anew for each."""
    borders, output = torch.tensor([0, len(prompt)]), [model.cfg.encoder.start_token_id]
    route = RouteContext(cu_groups=borders, dropless=True)
    memory = model.encode(torch.tensor(prompt), torch.arange(len(prompt)), VarlenContext(borders, route))
    for _ in range(count):
        own = torch.tensor([0, len(output)])
        route = RouteContext(cu_groups=own, dropless=True)
        context = VarlenContext(own, route, memory=memory, cu_memory_B1=borders)
        output.append(int(model(torch.tensor(output), torch.arange(len(output)), context)[-1].argmax()))
    return output[1:]


def complete(engine: Engine, work: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    for i, (prompt, params) in enumerate(work):
        engine.add_request(str(i), prompt, params)
    last = {}
    while engine.has_unfinished:
        last |= {output.request_id: output for output in engine.step()}
    return [last[str(i)] for i in range(len(work))]


@pytest.fixture(scope="module")
def expected(t5) -> list[list[int]]:
    found = [plainly(t5, prompt) for prompt in prompts()]
    assert len(set(map(tuple, found))) == len(found), "the input decides"
    return found


@pytest.mark.parametrize("small", [{}, {"num_blocks": 10, "max_num_batched_tokens": 42}], ids=["all at once", "tight"])
def test_O12_requests_of_all_lengths_give_the_tokens_of_a_plain_loop(t5, make_engine, expected, small):
    engine = make_engine(t5, **small)
    outputs = complete(engine, [(prompt, GREEDY) for prompt in prompts()])
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert [output.prompt_token_ids for output in outputs] == prompts()
    assert (engine.stats().preemptions > 0) == bool(small)


def test_choices_share_a_memory_and_draw_what_they_draw_alone(t5, make_engine):
    engine = make_engine(t5, num_blocks=7, max_num_batched_tokens=42)
    alone = make_engine(t5, enable_prefix_caching=False)
    work = [(prompt, SEEDED) for prompt in prompts()[1:4]]
    for (prompt, params), found in zip(work, complete(engine, work), strict=True):
        (wanted,) = complete(alone, [(prompt, params)])
        assert [choice.token_ids for choice in found.outputs] == [choice.token_ids for choice in wanted.outputs]
        assert len({tuple(choice.token_ids) for choice in found.outputs}) == 3
        for choice, other in zip(found.outputs, wanted.outputs, strict=True):
            for one, two in zip(choice.logprobs, other.logprobs, strict=True):
                assert one == pytest.approx(two, abs=1e-4)
    assert engine.stats().preemptions > 0


def test_every_layer_counts_the_tokens_of_its_stack(t5, make_engine):
    engine = make_engine(t5)
    engine.add_request("a", prompts()[3], SamplingParams(temperature=0, max_tokens=6, n=2))
    while engine.has_unfinished:
        engine.step()
    stats = engine.stats()
    assert stats.routing.layers == (1, 3, 4)
    assert [sum(counts) for counts in stats.routing.counts()] == [2 * 6, 17, 17], "one memory for both choices"
    assert stats.computed_tokens == 2 * 6 + 17


def test_what_a_page_held_before_is_never_read(t5, make_engine, expected):
    engine = make_engine(t5, num_blocks=10, enable_prefix_caching=False)
    for _ in range(2):
        (output,) = complete(engine, [(prompts()[3], GREEDY)])
        assert output.outputs[0].token_ids == expected[3]
        engine.runner.cache.keys.fill_(torch.nan)
        engine.runner.cache.values.fill_(torch.nan)
        random.Random(0).shuffle(engine.blocks.free)


def test_an_abort_changes_nobody_else(t5, make_engine, expected):
    engine = make_engine(t5)
    for name in "ab":
        engine.add_request(name, prompts()[2], GREEDY)
    engine.step()
    assert engine.abort("a").outputs[0].finish_reason == "abort"
    outputs = []
    while engine.has_unfinished:
        outputs = engine.step()
    assert outputs[0].outputs[0].token_ids == expected[2]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, r"prompt \(0 tokens\)"),
        ([1] * 64, {}, r"must not exceed 63 \(max_num_batched_tokens - 1"),
        ([1] * 81, {}, r"must not exceed 80 \(max_model_len\)"),
        (
            [1] * 80,
            {"max_num_batched_tokens": 81, "max_tokens": 80},
            r"start token \(1\) \+ max_tokens \(80\) must not",
        ),
    ],
)
def test_what_can_never_run_is_refused_at_once(t5, make_engine, prompt, params, message):
    most = params.pop("max_tokens", 4)
    engine = make_engine(t5, max_model_len=80, **params)
    with pytest.raises(RequestError, match=message):
        engine.add_request("a", prompt, SamplingParams(max_tokens=most))
    assert not engine.has_unfinished


def test_a_directory_is_served_from_text(t5_dir, t5, byte_level):
    text = "The import statement"
    ids = byte_level.encode(text)
    (output,) = LLM(t5_dir).generate(text, SamplingParams(temperature=0, max_tokens=8))
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == plainly(t5, ids, 8)
    assert output.outputs[0].text == byte_level.decode(output.outputs[0].token_ids)


@pytest.mark.parametrize("start", [0, 7])
def test_generation_is_that_of_transformers(make_engine, tmp_path, start):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=99, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=3, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=start,
    )  # fmt: skip
    theirs = SwitchTransformersForConditionalGeneration(config).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    sources = [[token % 99 for token in prompt] for prompt in prompts()]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs = complete(make_engine(load_model(tmp_path / "theirs")), [(source, params) for source in sources])
    theirs.generation_config.eos_token_id = None
    for source, output in zip(sources, outputs, strict=True):
        wanted = theirs.generate(torch.tensor([source]), max_new_tokens=32, do_sample=False)[0].tolist()
        assert [start, *output.outputs[0].token_ids] == wanted
