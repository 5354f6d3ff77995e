"""Switch and GShard beside DeepSpeed 0.19's gates: the same numbers where the rules agree, the difference where not.

| rule                    | DeepSpeed                                     | here                                      |
|-------------------------|-----------------------------------------------|-------------------------------------------|
| capacity                | ceil in float32: 1.2 · 50 / 2 gives 31        | exact integers: 30                        |
| min_capacity > tokens   | top-2: that many slots; top-1: AssertionError | never more than the tokens                |
| group                   | all tokens of the rank                        | a packed row; `group: rank` is theirs     |
| drops, top-1            | random (use_rts), or what topk makes of ties  | first come; `random` by keyed draws       |
| drops, top-2            | first choices before second ones              | `choice_major` is theirs                  |
| drops, top-k            | `position`, or `probs` (default)              | `token_major`, `probability`              |
| weights, top-2          | over the kept sum after dropping, if ≥ 1.2e-7 | before, or `renormalize_kept`: no floor   |
| balance loss, top-2     | shares of the first choices only              | shares of both choices                    |
| balance loss, padding   | probabilities of unused tokens count          | they do not                               |
| second expert           | global Gumbel noise, added to its input       | drawn or not; `gumbel` is keyed, pure     |
| first expert, RSample   | Gumbel noise moves the choice of top-1        | argmax (noisy_topk is another rule)       |
| NaN logits              | routed: expert 0, or NaN weights              | NonFiniteError                            |

DeepSpeed keeps process-wide state, so its answers come from one process of their own.
"""

import pytest
import torch

from turnout import NonFiniteError
from turnout.moe import RouteContext
from turnout.moe.routing.capacity import capacity
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.moe.routing.by_hand import kept, route


def numbers(tokens, experts, seed):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return 2 * logits + torch.linspace(1, 0, experts)  # the first experts overflow


SIZES = [(24, 4, 1.0), (32, 8, 1.25), (7, 3, 0.5), (64, 2, 0.75), (1, 4, 1.0)]
MANY = 1000  # their masks are [T, E, C]
CROWD = torch.tensor([[2.0, 0.0, 0.0]] * 12)
TIES = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [3.0, 0.0, 3.0], [-1.0, -1.0, -1.0]])
# both tokens' first choice is expert 0, which has one slot; the second token's other gate is 1e-10
FAINT = torch.tensor([[0.0, -1.0, -90.0, -90.0], [0.0, -90.0, -23.0, -91.0]])
HALF = CROWD[:4] * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
GUMBEL = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().repeat(MANY, 1)
NAN = torch.tensor([[2.0, 0.0, float("nan")], [0.0, 1.0, 0.0]])
PLAIN2 = {"top2_2nd_expert_sampling": False}

# name → DeepSpeed's function, logits, its settings
CASES = {
    **{f"all {n}": ("top1gating", numbers(t, e, n), {"capacity_factor": 50.0}) for n, (t, e, _) in enumerate(SIZES)},
    **{f"top1 {n}": ("top1gating", numbers(t, e, n), {"capacity_factor": f}) for n, (t, e, f) in enumerate(SIZES)},
    **{
        f"top2 {n}": ("top2gating", numbers(t, e, n), {"capacity_factor": f, **PLAIN2})
        for n, (t, e, f) in enumerate(SIZES)
    },
    **{
        f"{policy} {n}": ("topkgating", numbers(t, e, n), {"capacity_factor": f, "k": 2, "drop_policy": policy})
        for n, (t, e, f) in enumerate(SIZES)
        for policy in ("position", "probs")
    },
    "ties top1": ("top1gating", TIES, {"capacity_factor": 3.0}),
    "ties top2": ("top2gating", TIES, {"capacity_factor": 3.0, **PLAIN2}),
    "float capacity": ("top1gating", torch.zeros(50, 2), {"capacity_factor": 1.2}),
    "few tokens": ("top2gating", torch.zeros(3, 4), {"capacity_factor": 1.0, "min_capacity": 4, **PLAIN2}),
    "few tokens top1": ("top1gating", torch.zeros(3, 4), {"capacity_factor": 1.0, "min_capacity": 4}),
    "which": ("top1gating", CROWD, {"capacity_factor": 0.5, "use_rts": False}),
    "random": ("top1gating", CROWD.repeat(50, 1), {"capacity_factor": 0.5, "use_rts": True}),
    "faint": ("top2gating", FAINT, {"capacity_factor": 0.5, **PLAIN2}),
    "used": ("top1gating", HALF, {"capacity_factor": 4.0, "used": [1, 1, 0, 0]}),
    "gumbel": ("top2gating", GUMBEL, {"capacity_factor": 2.0}),
    "rsample": ("top1gating", GUMBEL, {"capacity_factor": 4.0, "noisy_gate_policy": "RSample"}),
    "nan top1": ("top1gating", NAN, {"capacity_factor": 4.0}),
    "nan top2": ("top2gating", NAN, {"capacity_factor": 4.0, **PLAIN2}),
}  # fmt: skip


def answer(function, logits, settings) -> dict:
    from deepspeed.moe import sharded_moe

    settings = {"min_capacity": 0, **settings}
    if "used" in settings:
        settings["used_token"] = torch.tensor(settings.pop("used"))
    given = logits.clone()
    try:
        loss, combine_TEC, mask_TEC, counts_E = getattr(sharded_moe, function)(given, **settings)
    except AssertionError as error:
        return {"error": str(error)}
    return {
        "loss": float(loss), "weights_TE": combine_TEC.sum(-1), "kept_TE": mask_TEC.any(-1),
        "counts": counts_E.tolist(), "slots": combine_TEC.shape[-1],
        "changed": not torch.equal(given.nan_to_num(), logits.nan_to_num()),
    }  # fmt: skip


def answers() -> dict:
    return {name: answer(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def deepspeed() -> dict:
    return run_ranks(answers, 1, fresh=True, timeout=120, env={"DS_ACCELERATOR": "cpu"})[0]


def as_table(routing, values):
    """A value of each kept assignment, at its expert: [T, E]."""
    zeros = torch.zeros(routing.probs_TE.shape, dtype=values.dtype)
    return zeros.scatter(1, routing.ids_TK, values * routing.kept_TK)


def agree(routing, theirs, *, loss=True):
    assert torch.equal(as_table(routing, routing.kept_TK), theirs["kept_TE"])
    torch.testing.assert_close(as_table(routing, routing.weights_TK), theirs["weights_TE"], rtol=1e-6, atol=1e-7)
    assert routing.counts_E.tolist() == theirs["counts"]
    if loss:
        assert routing.aux["balance"].item() == pytest.approx(theirs["loss"], rel=1e-6)


def gshard(logits, factor, **settings):
    """As near to DeepSpeed as the settings go."""
    theirs = {"second_policy": "all", "renormalize_kept": True, "drop_order": "choice_major", "min_capacity": 0}
    return route("gshard", logits, capacity_factor=factor, **theirs | settings)


@pytest.mark.parametrize("case", range(len(SIZES)))
def test_top1_chooses_weighs_and_measures_alike(deepspeed, case):
    logits = CASES[f"top1 {case}"][1]
    agree(route("switch", logits, capacity_factor=50.0), deepspeed[f"all {case}"])
    # under drops who stays is chance there; how many of each expert is not
    for order in ("token_major", "random", "probability"):
        routing = route("switch", logits, capacity_factor=SIZES[case][2], min_capacity=0, drop_order=order)
        theirs = deepspeed[f"top1 {case}"]
        assert as_table(routing, routing.kept_TK).sum(0).tolist() == theirs["kept_TE"].sum(0).tolist()
        assert routing.counts_E.tolist() == theirs["counts"]
        assert routing.aux["balance"].item() == pytest.approx(theirs["loss"], rel=1e-6)


@pytest.mark.parametrize("case", range(len(SIZES)))
def test_top2_keeps_and_weighs_alike(deepspeed, case):
    agree(gshard(CASES[f"top2 {case}"][1], SIZES[case][2]), deepspeed[f"top2 {case}"], loss=False)


@pytest.mark.parametrize("case", range(len(SIZES)))
@pytest.mark.parametrize(("policy", "order"), [("position", "token_major"), ("probs", "probability")])
def test_topk_drops_weighs_and_measures_alike(deepspeed, case, policy, order):
    agree(gshard(CASES[f"{policy} {case}"][1], SIZES[case][2], drop_order=order), deepspeed[f"{policy} {case}"])


def test_group_rank_is_their_group(deepspeed):
    logits, rows = CASES["top2 0"][1], RouteContext(cu_groups=torch.tensor([0, 8, 24]))
    agree(gshard(logits, SIZES[0][2], context=rows, group="rank"), deepspeed["top2 0"], loss=False)
    assert kept(gshard(logits, SIZES[0][2], context=rows)) != kept(gshard(logits, SIZES[0][2]))


def test_ties_go_to_the_lower_expert_in_both(deepspeed):
    agree(route("switch", TIES, capacity_factor=3.0), deepspeed["ties top1"])
    agree(gshard(TIES, 3.0), deepspeed["ties top2"], loss=False)


# Where the rules differ ---------------------------------------------------------------------------------------------


def test_their_capacity_is_rounded_in_floats(deepspeed):
    assert deepspeed["float capacity"]["slots"] == 31
    assert capacity(50, 1, 2, 1.2, 0) == 30


def test_their_least_capacity_may_exceed_the_tokens(deepspeed):
    assert deepspeed["few tokens"]["slots"] == 4
    assert "greater than min_capacity" in deepspeed["few tokens top1"]["error"]
    assert capacity(3, 1, 4, 1.0, 4) == 3
    assert route("switch", torch.zeros(3, 4), min_capacity=4).kept_TK.all()


def test_their_top1_keeps_no_first_comers(deepspeed):
    ours = route("switch", CROWD, capacity_factor=0.5, min_capacity=0)
    assert kept(ours) == [[1]] * 2 + [[0]] * 10
    stay = deepspeed["which"]["kept_TE"][:, 0]
    assert stay.sum() == 2
    assert not stay[:2].all()
    chance = deepspeed["random"]["kept_TE"][:, 0]
    drawn = route("switch", CROWD.repeat(50, 1), capacity_factor=0.5, min_capacity=0, drop_order="random").kept_TK[:, 0]
    assert chance.sum() == drawn.sum() == 100
    for stayed in (chance, drawn):  # evenly over the 600 tokens: hypergeometric, σ = 4.6
        assert abs(int(stayed[:300].sum()) - 50) < 4 * 4.6


def test_their_weights_are_divided_after_dropping(deepspeed):
    theirs = deepspeed["faint"]["weights_TE"]
    assert deepspeed["faint"]["kept_TE"].tolist() == [[True, True, False, False], [False, False, True, False]]
    assert theirs[1, 2] == pytest.approx(1.026e-10 / 2**-23, rel=1e-3)  # 9e-4: their floor outweighs the gate
    assert gshard(FAINT, 0.5).weights_TK[1].tolist() == [0.0, 1.0]
    before = gshard(FAINT, 0.5, renormalize_kept=False).weights_TK[1]
    assert before.tolist() == pytest.approx([1.0, 1.026e-10], rel=1e-3)


@pytest.mark.parametrize("case", range(len(SIZES)))
def test_their_top2_loss_counts_first_choices_only(deepspeed, case):
    logits = CASES[f"top2 {case}"][1]
    routing = gshard(logits, SIZES[case][2])
    mean = logits.softmax(-1).mean(0)
    first, second = (
        logits.shape[1] * (torch.bincount(ids, minlength=logits.shape[1]) / len(logits) * mean).sum()
        for ids in logits.topk(2).indices.T
    )
    assert deepspeed[f"top2 {case}"]["loss"] == pytest.approx(first.item(), rel=1e-5)
    assert routing.aux["balance"].item() == pytest.approx((first + second).item() / 2, rel=1e-5)
    assert routing.aux["balance"].item() != pytest.approx(first.item(), rel=1e-3)


def test_their_unused_tokens_move_the_loss(deepspeed):
    logits = CASES["used"][1]
    valid = RouteContext(valid_T=torch.tensor([True, True, False, False]))
    ours = route("switch", logits, valid).aux["balance"].item()
    best = CROWD[0].softmax(-1)[0].item()  # 0.787
    assert ours == pytest.approx(3 * best)
    other = (-CROWD[0]).softmax(-1)[0].item()  # 0.063, of the unused tokens
    assert deepspeed["used"]["loss"] == pytest.approx(3 * 0.5 * (best + other) / 2)


def test_their_second_expert_is_drawn_as_our_gumbel_and_changes_their_input(deepspeed):
    share = torch.tensor([0.2, 0.0, 0.5, 0.3])
    routing = gshard(GUMBEL, 4.0, second_policy="gumbel")
    for found in (deepspeed["gumbel"]["kept_TE"], as_table(routing, routing.kept_TK)):
        assert found[:, 1].all()
        often = found.float().mean(0) * torch.tensor([1.0, 0, 1, 1])
        assert ((often - share).abs() <= 4 * (share * (1 - share) / MANY).sqrt()).all()
    assert deepspeed["gumbel"]["changed"]
    assert not deepspeed["top2 0"]["changed"]
    again = gshard(GUMBEL, 4.0, second_policy="gumbel")
    assert torch.equal(again.ids_TK, routing.ids_TK)  # theirs depends on what was drawn before


def test_their_rsample_draws_the_first_expert(deepspeed):
    share = torch.tensor([0.1, 0.5, 0.25, 0.15])
    found = deepspeed["rsample"]["kept_TE"].float().mean(0)
    assert ((found - share).abs() <= 4 * (share * (1 - share) / MANY).sqrt()).all()
    assert route("switch", GUMBEL, capacity_factor=4.0, jitter=0.0).counts_E.tolist() == [0, MANY, 0, 0]


def test_they_route_nan_and_we_refuse(deepspeed):
    assert deepspeed["nan top1"]["counts"] == [1, 1, 0]
    assert deepspeed["nan top2"]["weights_TE"][0].isnan().all()
    for router in ("switch", "gshard"):
        with pytest.raises(NonFiniteError, match="first token 0"):
            route(router, NAN)
