"""Exclusions, biases, penalties and min-p: transformers' processors, vLLM's formulas in a float64 loop, and company."""

import itertools

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.step import Scheduled
from turnout.inference.run.logits import constrain
from turnout.inference.run.sampler import sample
from turnout.kernels.reference.sampling import _above_min_p, _truncate

V = 60
PROMPT = [3, 9, 9, 14, 30]
OUTPUT = [9, 7, 7, 21, 7]


def item(prompt=PROMPT, output=OUTPUT, ahead=(), seed=0, eos=(), **params) -> Scheduled:
    """A request about to get a token after `output`; what it has `ahead` of that is not looked at."""
    request = Request("x", prompt, SamplingParams(**params), eos_token_ids=frozenset(eos), seed=seed)
    request.token_ids += [*output, *ahead]
    ids = [*prompt, *output]
    return Scheduled(request, 0, len(ids), ids, (), samples=True)


def constrained(logits_V: torch.Tensor, **params) -> torch.Tensor:
    return constrain(logits_V[None], [item(**params)])[0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0)) * 3


def loop(logits_V: torch.Tensor, prompt, output, params: SamplingParams, stops=()) -> torch.Tensor:
    """vLLM's formulas, one token after another, in float64."""
    scores = logits_V.double().tolist()
    for token in range(len(scores)):
        x = scores[token]
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            x = -torch.inf
        for *before, last in params.bad_sequences:
            if token == last and (not before or output[-len(before) :] == before):
                x = -torch.inf
        if len(output) < params.min_tokens and token in stops:
            x = -torch.inf
        x += params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * output.count(token)
        x -= params.presence_penalty * (token in output)
        scores[token] = x
    return torch.tensor(scores, dtype=torch.float64)


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -2},
    {"presence_penalty": 1.5},
    {"repetition_penalty": 1.2, "presence_penalty": -1, "frequency_penalty": 0.3},
]
EXCLUSIONS = [
    {"logit_bias": {3: 5.5, 7: -100, 59: 100}},
    {"bad_token_ids": [4, [9], [21, 7, 40], [7, 21, 41], [30, 9, 7, 7, 21, 7, 42]]},
    {"allowed_token_ids": [1, 7, 30, 44]},
    {"min_tokens": 6, "stop_token_ids": [11, 12]},
    {"allowed_token_ids": [1, 7, 30, 44], "bad_token_ids": [[7, 44]], "logit_bias": {44: 100, 2: 50, 7: 3}},
]


@pytest.mark.parametrize("params", PENALTIES + EXCLUSIONS + [a | b for a in PENALTIES[-2:] for b in EXCLUSIONS])
def test_constraints_are_vllms_formulas(logits, params):
    built = item(**params, eos=[13])
    expected = loop(logits, PROMPT, OUTPUT, built.request.params, built.request.stop_ids)
    assert not torch.equal(expected, logits.double()), "it does something"
    before = logits.clone()
    torch.testing.assert_close(constrain(logits[None], [built])[0].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, before), "the caller's logits are left alone"


def test_tokens_after_the_sampled_position_are_not_looked_at(logits):
    for params in PENALTIES + EXCLUSIONS:
        assert torch.equal(constrained(logits, ahead=[44, 1], **params), constrained(logits, **params))


def test_bad_words_are_looked_for_in_the_output_only(logits):
    assert constrained(logits, output=[], bad_token_ids=[[30, 5], [14, 30, 6]]).isfinite().all()
    excluded = constrained(logits, output=[14, 30], bad_token_ids=[[30, 5], [14, 30, 6], [9, 8]]) == -torch.inf
    assert excluded.nonzero().flatten().tolist() == [5, 6]


def test_each_step_is_that_of_transformers(logits):
    ids, scores = torch.tensor([PROMPT + OUTPUT]), logits[None]
    pairs = [
        (RepetitionPenaltyLogitsProcessor(1.3), {"repetition_penalty": 1.3}),
        (SuppressTokensLogitsProcessor([4, 50]), {"bad_token_ids": [4, 50]}),
        (NoBadWordsLogitsProcessor([[4], [21, 7, 40], [9, 41]]), {"bad_token_ids": [4, [21, 7, 40], [9, 41]]}),
        (SequenceBiasLogitsProcessor([[[3], 5.5], [[7], -9.0]]), {"logit_bias": {3: 5.5, 7: -9}}),
    ]
    for processor, params in pairs:
        assert torch.equal(processor(ids, scores)[0], constrained(logits, **params)), params


@pytest.mark.parametrize("seed", range(20))
def test_filters_keep_what_those_of_transformers_keep(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, V, generator=generator) * 2
    draw = torch.rand(4, generator=generator).tolist()
    params = SamplingParams(temperature=0.2 + draw[0], top_k=2 + int(30 * draw[1]), top_p=draw[2], min_p=draw[3] * 0.3)
    expected = TemperatureLogitsWarper(params.temperature)(None, scores)
    probs = expected.softmax(-1)
    for warper in (MinPLogitsWarper(params.min_p), TopKLogitsWarper(params.top_k), TopPLogitsWarper(params.top_p)):
        expected = warper(None, expected)
    kept = _above_min_p(probs, torch.tensor([params.min_p]))
    kept = _truncate(kept, torch.tensor([params.top_k]), torch.tensor([params.top_p], dtype=torch.float64))
    assert torch.equal(kept > 0, expected.isfinite())
    torch.testing.assert_close(kept / kept.sum(), expected.softmax(-1))


def test_min_p_at_its_edges(logits):
    logits[[5, 41]] = 20.0
    probs = logits[None].softmax(-1)
    assert _above_min_p(probs, torch.tensor([1.0]))[0].nonzero().flatten().tolist() == [5, 41]
    assert _above_min_p(probs, torch.tensor([0.0])) is probs
    rows = [item(seed=seed, min_p=1.0) for seed in range(40)]
    assert {found.token for found in sample(logits.expand(40, -1), rows)} == {5, 41}


MATES = PENALTIES + EXCLUSIONS + [
    {"min_p": 0.2}, {"min_p": 0.1, "top_k": 5, "top_p": 0.7}, {"temperature": 0, "repetition_penalty": 2.0},
    {"logprobs": 4, "frequency_penalty": 1}, {},
]  # fmt: skip


@pytest.mark.parametrize("size", [V, 40_000])
def test_O6_M2_a_row_is_the_same_bits_in_any_company(size):  # noqa: N802
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(MATES), size, generator=generator)
    items = [item(seed=i, **params) for i, params in enumerate(MATES)]
    alone = [constrain(rows[i : i + 1], items[i : i + 1])[0] for i in range(len(items))]
    sampled = [sample(rows[i : i + 1], items[i : i + 1])[0] for i in range(len(items))]
    together = constrain(rows, items)
    for i in range(len(items)):
        assert torch.equal(together[i], alone[i]), MATES[i]
    assert sample(rows, items) == sampled
    for gone in range(len(items)):  # a mate leaves, and everyone after it moves up
        left = [i for i in range(len(items)) if i != gone]
        assert sample(rows[left], [items[i] for i in left]) == [sampled[i] for i in left]
    assert torch.equal(constrain(rows[-1:], items[-1:]), rows[-1:]), "who asks for nothing keeps the bits"


def test_a_request_that_excludes_every_token_fails_alone_and_says_so(logits):
    rows = [
        item(),
        item(allowed_token_ids=[4, 5], bad_token_ids=[[4], [7, 5]]),
        item(min_tokens=9, allowed_token_ids=[2], eos=[2]),
    ]
    first, *dead = sample(logits.expand(3, -1), rows)
    assert first == sample(logits[None], rows[:1])[0]
    assert [(found.token, found.excluded) for found in dead] == [(None, True)] * 2
    broken = logits.clone()
    broken[40] = torch.nan
    (found,) = sample(broken[None], [item(allowed_token_ids=[1])])
    assert (found.token, found.excluded) == (None, False), "a broken model is not the request's fault"


@pytest.mark.parametrize("temperature", [1e-9, 1e-5, 1.0, 1e9, 1e300])
def test_extreme_distributions_and_temperatures(temperature):
    lone = torch.full((V,), -torch.inf)
    lone[17] = -1e30
    steep = torch.linspace(-3e4, 3e4, V)
    for params in ({}, {"min_p": 0.5}, {"top_p": 1e-9}, {"top_k": 10**30}, {"repetition_penalty": 100.0}):
        for seed in range(5):
            (found,) = sample(lone[None], [item(seed=seed, temperature=temperature, logprobs=1, **params)])
            assert found.token == 17
            assert found.logprobs == {17: 0.0}
        (found,) = sample(steep[None], [item(temperature=temperature, **params)])
        assert found.token is not None
        if temperature < 1e-4:
            assert found.token == V - 1


def test_the_penalties_turn_greedy_choices_away_from_repetition(logits):
    best = logits.argsort(descending=True).tolist()
    for params in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 100.0}):
        logits[best[0]] = logits[best[1]] + 1.0
        fresh = sample(logits[None], [item(output=[], temperature=0, **params)])[0].token
        assert fresh == best[0]
        assert sample(logits[None], [item(output=[best[0]], temperature=0, **params)])[0].token == best[1]
    prompted = {name: sample(logits[None], [item([best[0]], [], temperature=0, **{name: 2.0})])[0].token
                for name in ("presence_penalty", "frequency_penalty")}  # fmt: skip
    assert set(prompted.values()) == {best[0]}, "only the output counts"
    assert sample(logits[None], [item([best[0]], [], temperature=0, repetition_penalty=100.0)])[0].token == best[1]


def test_history_is_needed_by_penalties_and_sequences_only():
    without = [{}, {"bad_token_ids": [4, 5]}, {"logit_bias": {1: 2}}, {"min_p": 0.5}, {"allowed_token_ids": [3]}]
    needing = [*PENALTIES, {"bad_token_ids": [[4, 5]]}, {"bad_words": ["a", "b"]}]
    assert [SamplingParams(**p).needs_history for p in itertools.chain(without, needing)] == [False] * 5 + [True] * 8
