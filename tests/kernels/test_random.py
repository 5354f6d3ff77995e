"""Philox4x32-10 against the known answers of Random123, and `uniform` as a function of its names alone."""

import pytest
import torch

from turnout.kernels import random, uniform

F = 0xFFFFFFFF
NAMES = {"step": 3, "layer": 2, "purpose": random.JITTER}


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = random.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == answer


def test_uniform_reads_counter_and_key_as_documented():
    seed, index = 0x0123456789ABCDEF, 5 + (7 << 32)
    counter = (5, 7, NAMES["step"], NAMES["layer"] << 16 | NAMES["purpose"] << 8)
    words = random.philox(tuple(map(torch.tensor, counter)), (torch.tensor(0x89ABCDEF), torch.tensor(0x01234567)))
    expected = [(int(word) >> 8) / 2**24 for word in words]
    assert uniform(seed, torch.tensor([index]), **NAMES, count=4)[0].tolist() == expected


def test_numbers_depend_on_the_index_not_on_the_batch():
    index = torch.randint(0, 1 << 40, (100,))
    together = uniform(1, index, **NAMES, count=3)
    order = torch.randperm(100)
    assert torch.equal(uniform(1, index[order], **NAMES, count=3), together[order])
    assert torch.equal(uniform(1, index[7:8], **NAMES, count=3), together[7:8])


def test_more_draws_begin_with_the_fewer_ones_and_do_not_repeat_past_256_blocks():
    many = uniform(1, torch.arange(2), **NAMES, count=3001)
    assert many.shape == (2, 3001)
    assert torch.equal(many[:, :5], uniform(1, torch.arange(2), **NAMES, count=5))
    assert not (many[:, :1024] == many[:, 1024:2048]).any(dim=1).all()
    assert many.flatten().unique().numel() > 0.99 * many.numel()


@pytest.mark.parametrize(
    "change", [{"step": 4}, {"layer": 3}, {"purpose": random.DROPOUT}, {"seed": 2}, {"index": 1 << 32}]
)
def test_each_name_changes_every_number(change):
    names = NAMES | {"seed": 1, "index": 0} | change
    index = torch.arange(50) + names.pop("index")
    assert (uniform(names.pop("seed"), index, **names) == uniform(1, torch.arange(50), **NAMES)).sum() == 0


def test_purposes_differ():
    purposes = [random.ROUTE_SECOND, random.JITTER, random.DROPOUT, random.SAMPLE, random.INIT]
    assert len(set(purposes)) == len(purposes)


def test_seeds_and_steps_may_be_given_for_each_token():
    seeds, steps = torch.tensor([5, 6, -1]), torch.tensor([1, 2, 3])
    rows = uniform(seeds, torch.arange(3), step=steps, layer=0, purpose=random.SAMPLE, count=2)
    for t, seed in enumerate((5, 6, (1 << 64) - 1)):
        alone = uniform(seed, torch.tensor([t]), step=t + 1, layer=0, purpose=random.SAMPLE, count=2)
        assert torch.equal(rows[t : t + 1], alone)


def test_numbers_are_uniform_in_the_half_open_unit_interval():
    draws = uniform(7, torch.arange(50_000), step=0, layer=0, purpose=random.INIT, count=4)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 5 * (1 / 12 / draws.numel()) ** 0.5
    assert abs(draws.var() - 1 / 12) < 1e-3
    bins = torch.histc(draws, 64, 0, 1)
    expected = draws.numel() / 64
    assert ((bins - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi squared
    correlation = torch.corrcoef(torch.stack((*draws.T, draws[:, 0].roll(1))))
    assert (correlation - torch.eye(5)).abs().max() < 0.03


def test_no_tokens_give_no_numbers():
    assert uniform(1, torch.empty(0, dtype=torch.int64), **NAMES, count=3).shape == (0, 3)


def test_normal_numbers_are_normal_and_named_like_uniform_ones():
    draws = random.normal(7, torch.arange(20_000), **NAMES, count=3)
    assert draws.shape == (20_000, 3)
    assert draws.dtype == torch.float32
    assert draws.isfinite().all()
    flat = draws.double().flatten()
    error = len(flat) ** -0.5
    assert abs(flat.mean()) < 4 * error
    assert abs(flat.var() - 1) < 4 * 2**0.5 * error
    for bound in (-2.0, -0.5, 0.0, 1.0, 3.0):
        share = torch.special.ndtr(torch.tensor(bound, dtype=torch.float64))
        assert abs((flat < bound).double().mean() - share) < 4 * error * (share * (1 - share)) ** 0.5
    assert abs(torch.corrcoef(draws.double().T) - torch.eye(3)).max() < 4 * 20_000**-0.5
    assert torch.equal(random.normal(7, torch.arange(50, 60), **NAMES, count=3), draws[50:60])
