"""Sampling through the engine: what a request asks for holds in any company, order, chunking and after preemption."""

import pytest

from turnout import SamplingParams

from .test_engine import complete, mixed, tokens

ASKS = [
    {"repetition_penalty": 1.4},
    {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"min_p": 0.05, "logit_bias": {7: 30.0, 12: -100}},
    {"temperature": 0, "bad_token_ids": [3, [7, 12], [5, 6, 7]], "repetition_penalty": 0.9},
    {"allowed_token_ids": list(range(40, 80)), "frequency_penalty": -0.5},
    {"top_k": 10**9, "top_p": 0.7, "min_tokens": 3, "stop_token_ids": [11, 50]},
    {"temperature": 0, "prompt_logprobs": 1, "presence_penalty": 2.0},
    {},
]


def asking():
    """The 32 requests of all lengths, each with another of the wishes."""
    work = []
    for i, (ids, params) in enumerate(mixed(temperature=1.0)):
        options = {"temperature": 1.0, "seed": i, "logprobs": 1} | ASKS[i % len(ASKS)]
        work.append((ids, SamplingParams(max_tokens=params.max_tokens, **options)))
    return work


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.full), True])
def test_O6_P3_wishes_hold_in_a_full_batch_with_preemption_as_alone(make_engine, overlap):  # noqa: N802
    sizes = {"num_blocks": 20, "max_num_seqs": 8, "max_num_batched_tokens": 48, "overlap": overlap}
    together, alone = make_engine(**sizes), make_engine(enable_prefix_caching=False)
    work = asking()
    outputs = complete(together, work)
    assert together.stats().preemptions > 0
    assert together.stats().prefix_hits > 0
    for request, output in zip(work, outputs, strict=True):
        (expected,) = complete(alone, [request])
        assert tokens(output) == tokens(expected), request[1]
        assert len(output.outputs[0].logprobs) == len(tokens(output)[0])


@pytest.mark.parametrize("asks", ASKS)
def test_O6_a_step_planned_ahead_changes_nothing(make_engine, asks):  # noqa: N802
    """The history that penalties and bad words read is never one token short."""
    work = [(list(range(5, 25)), SamplingParams(**({"max_tokens": 16, "seed": 2} | asks)))]
    (plain,), (ahead,) = (complete(make_engine(overlap=overlap), work) for overlap in (False, True))
    assert tokens(ahead) == tokens(plain)


def test_O6_choices_are_distinct_and_repeat(make_engine):  # noqa: N802
    params = SamplingParams(n=4, seed=3, max_tokens=10, repetition_penalty=1.3, min_p=0.02)
    first, again = (complete(make_engine(max_num_seqs=seats), [([4, 5, 6], params)])[0] for seats in (1, 8))
    assert tokens(first) == tokens(again)
    assert len({tuple(choice) for choice in tokens(first)}) == 4


def test_O6_greedy_ignores_the_seed_and_neutral_values_change_nothing(make_engine):  # noqa: N802
    engine, prompt = make_engine(), list(range(5, 25))
    greedy = [SamplingParams(temperature=0, seed=seed, max_tokens=12) for seed in (None, 1, 2**64 - 1)]
    assert len({str(tokens(output)) for output in complete(engine, [(prompt, params) for params in greedy])}) == 1
    neutral = {
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {},
        "bad_words": [], "bad_token_ids": [], "top_k": 10**12, "top_p": 1.0, "allowed_token_ids": list(range(321)),
    }  # fmt: skip
    plain, same = (SamplingParams(seed=4, max_tokens=12, **options) for options in ({}, neutral))
    first, second = complete(engine, [(prompt, plain), (prompt, same)])
    assert tokens(first) == tokens(second)


def test_O8_every_end_of_sequence_token_ends_and_min_tokens_and_ignore_eos_hold_them_off(make_model, make_engine):  # noqa: N802
    prompt, length = list(range(5, 25)), {"temperature": 0, "max_tokens": 12}
    (free,) = complete(make_engine(), [(prompt, SamplingParams(**length))])
    ids = tokens(free)[0]
    first, second = ids[3], next(token for token in ids[5:] if token not in ids[:4])
    engine = make_engine(make_model(eos_token_id=(second, first)))
    (ended,) = complete(engine, [(prompt, SamplingParams(**length))])
    assert (tokens(ended)[0], ended.outputs[0].finish_reason) == (ids[: ids.index(first) + 1], "stop")
    (ignored,) = complete(engine, [(prompt, SamplingParams(**length, ignore_eos=True))])
    assert tokens(ignored)[0] == ids
    (late,) = complete(engine, [(prompt, SamplingParams(**length, min_tokens=9))])
    assert not set(tokens(late)[0][:9]) & {first, second}
    (biased,) = complete(engine, [(prompt, SamplingParams(**length, logit_bias={second: 100}))])
    assert (tokens(biased)[0], biased.outputs[0].text) == ([second], "")
    (held,) = complete(engine, [(prompt, SamplingParams(**length, logit_bias={second: 100}, min_tokens=2))])
    assert second not in tokens(held)[0][:2], "a bias does not lift what min_tokens suppresses"
    assert tokens(held)[0][2] == second


def test_P8_lengths_at_their_edges(make_engine):  # noqa: N802
    engine = make_engine()
    work = [([1, 2, 3], SamplingParams(max_tokens=n, min_tokens=n, stop_token_ids=list(range(300)))) for n in (1, 2, 9)]
    assert [len(tokens(output)[0]) for output in complete(engine, work)] == [1, 2, 9]
