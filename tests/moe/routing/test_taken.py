"""Slots that earlier tokens have taken: a sequence that is routed in pieces meets the fate of the whole.

T tokens, W width, E experts, P pieces.
"""
# ruff: noqa: N802 (M1 is the name of a rule)

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.moe import MoEConfig, RouteContext
from turnout.moe.routing.registry import ROUTERS, build_router
from turnout.moe.routing.router import Router

E, WIDTH, LAYER, TOKENS = 6, 5, 3, 24
CAUSAL = [name for name, router in ROUTERS.items() if router.causal]
POLICIES = {"gshard": ["random", "all", "threshold", "none", "gumbel"]}
CASES = [(name, policy) for name in CAUSAL for policy in POLICIES.get(name, [None])]


def make(router: str, policy: str | None, factor: float, order: str) -> Router:
    """In evaluation mode, with random weights and a capacity that does not follow from the length at hand."""
    grouped = {"top_k": 3, "expert_groups": 3, "top_groups": 2} if router.startswith("deepseek") else {}
    second = {} if policy is None else {"second_policy": policy, "second_threshold": 0.3}
    module = build_router(
        MoEConfig(
            width=WIDTH, expert_width=4, num_experts=E, router=router, capacity_factor=1.0, drop_order=order,
            eval_capacity_factor=factor, capacity_tokens=TOKENS, min_capacity=1, **grouped, **second,
        ), LAYER,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return module.eval()


def context_of(ids_T, taken_E=None):
    taken = None if taken_E is None else {LAYER: taken_E[None]}
    return RouteContext(cu_groups=torch.tensor([0, len(ids_T)]), token_ids_T=ids_T, taken=taken)


@pytest.mark.parametrize(("router", "policy"), CASES)
@settings(max_examples=15, deadline=None)
@given(
    cuts=st.sets(st.integers(1, TOKENS - 1)), factor=st.sampled_from([0.3, 0.7]), seed=st.integers(0, 999),
    order=st.sampled_from(["token_major", "choice_major", "probability", "random"]),
)  # fmt: skip
def test_pieces_that_know_what_is_taken_are_the_whole(router, policy, cuts, factor, seed, order):
    module = make(router, policy, factor, order)
    generator = torch.Generator().manual_seed(seed)
    x_TW = torch.randn(1, WIDTH, generator=generator) + 0.3 * torch.randn(TOKENS, WIDTH, generator=generator)
    ids_T = torch.randint(0, 1000, (TOKENS,), generator=generator)
    whole = module(x_TW, context_of(ids_T))
    assert module.dropless or not whole.kept_TK[whole.wanted_TK].all() or router == "hash", "the capacity is tight"
    taken_E = torch.zeros(E, dtype=torch.int32)
    for start, end in itertools.pairwise([0, *sorted(cuts), TOKENS]):
        piece = module(x_TW[start:end], context_of(ids_T[start:end], taken_E))
        assert torch.equal(piece.ids_TK, whole.ids_TK[start:end])
        assert torch.equal(piece.kept_TK, whole.kept_TK[start:end])
        taken_E = taken_E + torch.bincount(piece.ids_TK[piece.kept_TK], minlength=E)


def test_a_group_s_slots_are_its_own():
    """Two groups, of which one has had its slots: only its tokens are dropped."""
    module = make("switch", None, 0.5, "token_major")
    x_TW, ids_T = torch.randn(1, WIDTH).expand(8, WIDTH), torch.arange(8)
    full_GE = torch.tensor([[2] * E, [0] * E])
    context = RouteContext(cu_groups=torch.tensor([0, 4, 8]), token_ids_T=ids_T, taken={LAYER: full_GE})
    assert module(x_TW, context).kept_TK[:, 0].tolist() == [False] * 4 + [True, True, False, False]


def test_what_is_taken_is_looked_up_by_the_router_s_own_layer():
    module = make("switch", None, 0.5, "token_major")
    full_GE = torch.full((1, E), 2)
    context = RouteContext(token_ids_T=torch.arange(4), taken={LAYER - 1: 0 * full_GE, LAYER: full_GE})
    assert not module(torch.randn(4, WIDTH), context).kept_TK.any()


def test_M1_padding_takes_no_slot_and_counts_nowhere():
    """Padding that would fill every expert stands before, between and behind; tokens keep what they keep without."""
    module = make("topk_softmax", None, 0.5, "token_major")
    generator = torch.Generator().manual_seed(0)
    x_TW, ids_T = torch.randn(TOKENS, WIDTH, generator=generator), torch.arange(TOKENS)
    valid_T = torch.rand(TOKENS, generator=generator) > 0.5
    taken = {LAYER: torch.ones(1, E, dtype=torch.int32)}
    context = RouteContext(cu_groups=torch.tensor([0, TOKENS]), token_ids_T=ids_T, taken=taken, valid_T=valid_T)
    padded, alone = module(x_TW, context), module(x_TW[valid_T], context_of(ids_T[valid_T], taken[LAYER][0]))
    assert not alone.kept_TK.all(), "the capacity is tight"
    assert not padded.wanted_TK[~valid_T].any()
    assert torch.equal(padded.kept_TK[valid_T], alone.kept_TK)
    assert torch.equal(padded.counts_E, alone.counts_E)
