"""Hash routing: a fixed, even hash of the token id, and nothing else."""

import pytest
import torch

from turnout import ConfigError
from turnout.moe import RouteContext
from turnout.moe.routing.hash import hash_ids
from turnout.tests.moe.routing.by_hand import kept, make

VOCABULARY = torch.arange(32_768)


def routed(ids, experts=8, *, x=None, **settings):
    ids = torch.as_tensor(ids)
    x = torch.zeros(len(ids), experts) if x is None else x
    return make("hash", experts, **settings)(x, RouteContext(token_ids_T=ids))


def test_the_hash_never_changes():
    """Checkpoints depend on these numbers."""
    assert hash_ids(torch.arange(16), 0, 8).tolist() == [6, 7, 0, 5, 5, 5, 6, 1, 1, 0, 2, 4, 5, 5, 3, 5]
    assert hash_ids(torch.arange(16), 3, 8).tolist() == [4, 5, 0, 1, 2, 4, 6, 0, 4, 4, 6, 6, 1, 2, 5, 6]


@pytest.mark.parametrize("experts", [2, 3, 8, 60, 64])
def test_a_vocabulary_spreads_evenly(experts):
    counts = torch.bincount(hash_ids(VOCABULARY, 1, experts), minlength=experts).double()
    mean = len(VOCABULARY) / experts
    chi2 = ((counts - mean) ** 2 / mean).sum().item()
    free = experts - 1
    assert abs(chi2 - free) < 4 * (2 * free) ** 0.5  # as even as a random hash, and no more even than that


def test_neighbouring_ids_and_layers_are_independent():
    first, other = hash_ids(VOCABULARY, 0, 8), hash_ids(VOCABULARY, 1, 8)
    expected, sigma = len(VOCABULARY) / 8, (len(VOCABULARY) * 7 / 64) ** 0.5
    for a, b in ((first[1:], first[:-1]), (first[8:], first[:-8]), (first, other)):
        assert abs(int((a == b).sum()) - expected) < 4 * sigma


def test_the_token_id_alone_decides():
    ids = torch.tensor([5, 9, 5, 1000, 9, 5])
    routing = routed(ids)
    assert torch.equal(routing.ids_TK[:, 0], hash_ids(ids, 0, 8))
    other = routed(ids, x=torch.randn(6, 8).bfloat16(), training=False)
    assert torch.equal(other.ids_TK, routing.ids_TK)
    assert torch.equal(routed(ids.int()).ids_TK, routing.ids_TK)


def test_there_is_nothing_to_learn():
    module = make("hash", 8)
    assert not module.state_dict()
    assert not list(module.parameters())
    routing = routed(VOCABULARY[:100])
    assert routing.weights_TK.eq(1).all()
    assert routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.probs_TE, torch.nn.functional.one_hot(routing.ids_TK[:, 0], 8).float())
    assert routing.logits_TE.eq(0).all()
    assert not routing.aux
    assert not module.needs_loss


def test_missing_token_ids_are_an_error_that_says_what_to_pass():
    with pytest.raises(ConfigError, match=r"moe.router \(hash\) needs the token ids.*RouteContext\(token_ids_T="):
        make("hash", 8)(torch.zeros(3, 8), RouteContext())


def test_capacity_and_reroute_hold_and_the_following_experts_are_asked():
    ids = torch.full((5,), 7)
    home = int(hash_ids(ids[:1], 0, 3))
    settings = {"capacity_factor": 1.0, "min_capacity": 0}  # two slots
    assert kept(routed(ids, 3, **settings)) == [[1], [1], [0], [0], [0]]
    retried = routed(ids, 3, reroute=2, **settings)
    assert retried.kept_TK.all()
    assert retried.ids_TK[:, 0].tolist() == [home, home, (home + 1) % 3, (home + 1) % 3, (home + 2) % 3]
    assert retried.weights_TK.eq(1).all()


def test_whatever_order_says_probability_is_the_order_of_tokens():
    ids = torch.full((5,), 7)
    settings = {"capacity_factor": 1.0, "min_capacity": 0}
    assert kept(routed(ids, 3, drop_order="probability", **settings)) == kept(routed(ids, 3, **settings))
    assert make("hash", 3, drop_order="probability").causal_in_training
    assert not make("hash", 3, drop_order="probability", reroute=1).causal_in_training
    assert not make("hash", 3, drop_order="random").causal_in_training
