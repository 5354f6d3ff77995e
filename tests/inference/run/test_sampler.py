"""The sampler: greedy, truncation and seeded draws, one row a request, independent of the other rows."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch

from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.step import Scheduled
from turnout.inference.run.sampler import Sampled, sample
from turnout.kernels.reference.sampling import row_sums

V = 50


def request(position: int = 3, choice: int = 0, eos: int | None = None, **params) -> Request:
    return Request(
        id="x", prompt_token_ids=[0] * position, params=SamplingParams(**params), choice=choice,
        eos_token_ids=frozenset() if eos is None else frozenset([eos]),
    )  # fmt: skip


def choose(logits_RV: torch.Tensor, requests: Sequence[Request], seeds: Iterable[int]) -> list[Sampled]:
    """Sample the requests' next tokens under these seeds."""
    items = []
    for request, seed in zip(requests, seeds, strict=True):
        request = replace(request, seed=seed)
        items.append(Scheduled(request, request.num_tokens - 1, 1, [0], [1], samples=True))
    return sample(logits_RV, items)


def one(logits: torch.Tensor, seed: int = 0, **params) -> Sampled:
    return choose(logits[None], [request(**params)], [seed])[0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2


def draws(logits: torch.Tensor, count: int, **params) -> torch.Tensor:
    """How often each token comes, over `count` seeds."""
    tokens = [s.token for s in choose(logits.expand(count, -1), [request(**params)] * count, range(count))]
    return torch.bincount(torch.tensor(tokens), minlength=V)


def test_temperature_zero_is_the_highest_logit_and_the_lowest_id_on_ties():
    logits = torch.zeros(V)
    logits[[9, 4, 30]] = 5.0
    assert one(logits, temperature=0).token == 4
    assert one(logits, temperature=1e-30).token == 4


def test_draws_follow_the_softmax_of_logits_over_temperature(logits):
    count = 20_000
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1) * count
        found = draws(logits, count, temperature=temperature)
        seen = expected > 5
        chi2 = ((found - expected)[seen] ** 2 / expected[seen]).sum().item()
        degrees = int(seen.sum())
        assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


def test_top_k_keeps_exactly_k_tokens_lowest_ids_first_on_ties(logits):
    found = draws(logits, 4000, top_k=5)
    assert set(found.nonzero().flatten().tolist()) == set(logits.topk(5).indices.tolist())
    ties = draws(torch.zeros(V), 2000, top_k=3)
    assert ties.nonzero().flatten().tolist() == [0, 1, 2]
    assert one(logits, top_k=10**30, seed=3).token == one(logits, seed=3).token == one(logits, top_k=-1, seed=3).token
    assert one(logits, top_k=1).token == int(logits.argmax())


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits):
    probs, order = logits.softmax(-1).sort(descending=True)
    size = int((probs.cumsum(0) < 0.7).sum()) + 1
    found = draws(logits, 6000, top_p=0.7)
    assert set(found.nonzero().flatten().tolist()) == set(order[:size].tolist())
    assert one(logits, top_p=1e-9).token == int(logits.argmax())


def test_top_p_counts_what_top_k_has_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    found = choose(logits.expand(500, -1), [request(top_k=2, top_p=0.5)] * 500, range(500))
    assert {s.token for s in found} == {0}, "0.4 / 0.7 is more than 0.5 already"


def test_a_flat_distribution_over_a_large_vocabulary_is_truncated_as_exactly():
    """More tokens than the sampler looks at first."""
    logits = torch.zeros(3000)
    for params, size in (({"top_p": 0.6}, 1800), ({"top_k": 2000}, 2000), ({"top_k": 1024, "top_p": 0.5}, 512)):
        found = choose(logits.expand(300, -1), [request(**params)] * 300, range(300))
        assert size * 0.95 < max(s.token for s in found) < size


def test_a_row_draws_the_same_in_any_company(logits):
    generator = torch.Generator().manual_seed(1)
    others = torch.randn(6, V, generator=generator)
    mates = [request(temperature=0), request(top_k=2), request(top_p=0.3), request(logprobs=3), request(), request()]
    for position in range(1, 20):
        mine = request(position=position, top_p=0.9, top_k=20)
        alone = choose(logits[None], [mine], [5])[0].token
        for row in range(7):
            rows = torch.cat([others[:row], logits[None], others[row:]])
            assert (
                choose(rows, [*mates[:row], mine, *mates[row:]], [9] * row + [5] + [9] * (6 - row))[row].token == alone
            )


def test_the_key_is_seed_choice_and_position():
    flat = torch.zeros(100_000)
    keys = [(seed, choice, position) for seed in (0, 1, 2**64 - 1) for choice in (0, 1) for position in (1, 2)]
    requests = [request(choice=choice, position=position) for _, choice, position in keys]
    found = [s.token for s in choose(flat.expand(len(keys), -1), requests, [seed for seed, _, _ in keys])]
    assert len(set(found)) == len(keys)
    assert found == [s.token for s in choose(flat.expand(len(keys), -1), requests, [seed for seed, _, _ in keys])]


def test_suppressed_tokens_never_come_until_min_tokens_are_out(logits):
    logits[11] = 100.0
    assert one(logits, temperature=0, eos=11).token == 11
    assert one(logits, temperature=0, eos=11, min_tokens=1).token != 11
    assert one(logits, temperature=0, eos=11, min_tokens=1, ignore_eos=True).token == 11
    assert one(logits, temperature=0, stop_token_ids=[11, 10**6], min_tokens=1).token != 11


def test_logprobs_are_those_of_the_raw_logits(logits):
    expected = logits.log_softmax(-1)
    found = one(logits, temperature=0.3, top_k=4, logprobs=3, seed=2)
    assert next(iter(found.logprobs)) == found.token
    assert set(found.logprobs) == {found.token, *logits.topk(3).indices.tolist()}
    for token, logprob in found.logprobs.items():
        assert logprob == pytest.approx(expected[token].item(), abs=1e-6)
    assert list(one(logits, logprobs=0).logprobs) == [one(logits).token]
    assert one(logits).logprobs is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_p": 0.5}, {"logprobs": 2}, {}])
def test_logits_that_are_not_finite_fail_their_own_row_only(logits, bad, params):
    broken = logits.clone()
    broken[7] = bad
    rows = [request(**params), request(**params), request(**params)]
    found = choose(torch.stack([logits, broken, logits]), rows, [1, 1, 1])
    assert found[1] == Sampled(None)
    assert found[0] == found[2] == one(logits, seed=1, **params)


def test_tokens_at_minus_infinity_never_come(logits):
    logits[: V - 1] = -torch.inf
    assert one(logits).token == V - 1
    assert one(torch.full((V,), -torch.inf)) == Sampled(None)


WIDE = 60_000  # numbers that PyTorch divides over threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_S0_a_row_of_a_large_vocabulary_is_the_same_in_any_company(two_threads):  # noqa: N802 (S0 is a rule's name)
    logits = torch.randn(24, WIDE) * torch.rand(24, 1) * 4
    kinds = [
        {"temperature": 0.7, "top_p": 0.9}, {"top_k": 2000, "top_p": 0.95, "logprobs": 20},
        {"temperature": 2.5, "top_p": 0.999}, {"min_p": 0.01, "logprobs": 3},
    ]  # fmt: skip
    requests = [request(position=5 + row, **kinds[row % len(kinds)]) for row in range(24)]
    together = choose(logits, requests, range(24))
    for size in (1, 3):
        for row in range(0, 24, size):
            part = slice(row, row + size)
            assert choose(logits[part].clone(), requests[part], range(row, row + size)) == together[part]


def test_S0_row_sums_do_not_depend_on_company(two_threads):  # noqa: N802 (S0 is a rule's name)
    probs = (torch.randn(48, WIDE) * torch.rand(48, 1) * 4).softmax(-1)
    sums = row_sums(probs)
    torch.testing.assert_close(sums, probs.double().sum(-1, keepdim=True))
    for row in range(48):
        assert torch.equal(row_sums(probs[row : row + 1]), sums[row : row + 1])
