"""Feed-forward networks with some of their hidden units."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from turnout import ConfigError, NonFiniteError
from turnout.moe.compress.channels import DAMP, choose, eliminate, narrow_block, narrower
from turnout.moe.compress.seen import Seen
from turnout.moe.layers.ffn import ACTIVATIONS, FeedForward
from turnout.moe.layers.moe import MoE
from turnout.tests.helpers.decoders import logits, make_config, make_model

T, D, F = 200, 8, 24


def rows(hidden: int = F, rank: int = 6) -> torch.Tensor:
    """Hidden rows that depend on one another, so that some can be foretold of others."""
    torch.manual_seed(0)
    return torch.randn(T, rank) @ torch.randn(rank, hidden) + 0.3 * torch.randn(T, hidden)


def seen(h_TF: torch.Tensor, gram: bool = True) -> Seen:
    found = Seen.nothing(h_TF.shape[1], gram)
    found.add(h_TF)
    return found


def noticed(model, gram=True):
    """What the hidden units of every feed-forward network of `model` were, by block."""
    found, hooks = [{} for _ in model.blocks], []
    for met, block in zip(found, model.blocks, strict=True):
        sparse = isinstance(block.ffn, MoE)
        for name, ffn in (("ffn", block.ffn), ("ffn.shared", block.ffn.shared if sparse else None)):
            if isinstance(ffn, FeedForward):
                met[f"{name}.w_out"] = [Seen.nothing(ffn.w_out.in_features, gram)]
                take = met[f"{name}.w_out"][0].add
                hooks.append(ffn.w_out.register_forward_pre_hook(lambda _, given, take=take: take(given[0])))
        if sparse:
            moe = block.ffn
            own = met["ffn.experts.w_out"] = [Seen.nothing(moe.cfg.expert_width, gram) for _ in moe.experts.w_in]
            hooks.append(moe.register_forward_hook(lambda _, x, y, moe=moe, own=own: by_expert(moe, x[0], y[1], own)))
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


def by_expert(moe, x_TD, routing, own):
    for expert, one in enumerate(own):
        rows_ND = x_TD[((routing.ids_TK == expert) & routing.kept_TK).any(1)]
        one.add(moe.experts.act(rows_ND @ moe.experts.w_in[expert].mT))


def narrowed(model, keep, met):
    small, cfg = deepcopy(model), narrower(model.cfg, keep)
    notes = [narrow_block(block, cfg, one) for block, one in zip(small.blocks, met, strict=True)]
    small.cfg = cfg
    return small, notes


@pytest.mark.parametrize("units", [F, 150])  # one at a time, and some
def test_those_that_stay_take_over_as_the_normal_equations_say(units):
    gram_FF = rows(units).double().mT @ rows(units).double()
    w_FD = torch.randn(units, D, dtype=torch.float64)
    kept_S, found_FD = eliminate(gram_FF, w_FD, units // 3)
    gone_R = torch.tensor([unit for unit in range(units) if unit not in kept_S])
    assert kept_S.equal(kept_S.sort().values)
    damped_FF = gram_FF + DAMP * gram_FF.diagonal().mean() * torch.eye(units, dtype=torch.float64)
    takes_SD = torch.linalg.solve(damped_FF[kept_S][:, kept_S], damped_FF[kept_S][:, gone_R] @ w_FD[gone_R])
    assert torch.allclose(found_FD[kept_S], w_FD[kept_S] + takes_SD, rtol=1e-8, atol=1e-10)
    assert not found_FD[gone_R].any()


def test_the_first_to_go_is_the_one_whose_going_costs_least():
    h_TF = rows().double()
    gram_FF, w_FD = h_TF.mT @ h_TF, torch.randn(F, D, dtype=torch.float64)
    damped_FF = gram_FF + DAMP * gram_FF.diagonal().mean() * torch.eye(F, dtype=torch.float64)

    def cost(unit):
        others = [other for other in range(F) if other != unit]
        takes_SD = torch.linalg.solve(damped_FF[others][:, others], damped_FF[others][:, [unit]] @ w_FD[[unit]])
        moved_FD = torch.zeros_like(w_FD)
        moved_FD[others], moved_FD[unit] = takes_SD, -w_FD[unit]
        return float((moved_FD * (damped_FF @ moved_FD)).sum())

    first = min(range(F), key=cost)
    assert set(range(F)) - set(eliminate(gram_FF, w_FD, F - 1)[0].tolist()) == {first}


def test_what_was_lost_is_told_and_taking_over_loses_less_than_leaving_out():
    h_TF, w_in_HD, w_out_FD = rows(), torch.randn(2 * F, D), torch.randn(F, D)
    whole_TD = h_TF @ w_out_FD
    lost = {}
    for name, known in (("gram", seen(h_TF)), ("squares", seen(h_TF, gram=False)), ("weights", None)):
        found = choose(w_in_HD, w_out_FD, F // 2, known)
        moved_TD = h_TF[:, found.kept_S] @ found.w_out_SD - whole_TD
        lost[name] = float(moved_TD.square().sum() / whole_TD.square().sum())
        if name == "gram":
            assert found.lost == pytest.approx(lost[name], rel=1e-3)
        else:
            assert found.w_out_SD.equal(w_out_FD[found.kept_S])
            assert (found.lost is None) == (known is None)
    assert lost["gram"] < 0.3 * min(lost["squares"], lost["weights"])


def test_without_correlations_the_largest_products_stay():
    w_in_HD, w_out_FD, h_TF = torch.randn(2 * F, D), torch.randn(F, D), torch.randn(T, F) * torch.arange(1, F + 1)
    by_rows = h_TF.square().sum(0) * w_out_FD.square().sum(1)
    by_weights = w_in_HD.square().sum(1).view(2, F).sum(0) * w_out_FD.square().sum(1)
    for known, size_F in ((seen(h_TF, gram=False), by_rows), (None, by_weights)):
        stay = size_F.topk(10).indices.sort().values
        assert choose(w_in_HD, w_out_FD, 10, known).kept_S.equal(stay)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("moe", [None, {"every": 1, "shared_experts": 1}], ids=["dense", "experts"])
def test_units_that_say_nothing_go_and_nothing_changes(activation, moe):
    """Half of the units have an output row of zeros: gate, up, bias and output rows must be those of the other half."""
    bias = {"bias": True} if moe and activation == "swiglu_clamped" else {}
    moe = moe and moe | {"activation": activation, **bias}
    model = make_model(moe, layers=2, activation=activation)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("ffn.w_out.weight") or name.endswith("shared.w_out.weight"):
                weight[:, torch.randperm(weight.shape[1])[::2]] = 0
            elif name.endswith("experts.w_out"):
                for one in weight:
                    one[torch.randperm(len(one))[::2]] = 0
    for met in ([{}, {}], noticed(model, gram=False)):
        small, _ = narrowed(model, 0.5, met)
        assert torch.allclose(logits(small), logits(model), atol=1e-4)
    cfg = small.cfg
    assert (cfg.ffn_width, cfg.moe and cfg.moe.expert_width) == (16, moe and 8)
    assert {name: tensor.shape for name, tensor in type(model)(cfg).state_dict().items()} == {
        name: tensor.shape for name, tensor in small.state_dict().items()
    }


@pytest.mark.parametrize("moe", [None, {"every": 1, "shared_experts": 1}], ids=["dense", "experts"])
def test_all_units_are_the_model_itself_to_the_bit(moe):
    model = make_model(moe)
    same, notes = narrowed(model, 1.0, noticed(model))
    assert same.cfg == model.cfg
    assert torch.equal(logits(same), logits(model))
    assert notes[0]["lost"] == ({"ffn": 0.0} if moe is None else {"experts": [0.0] * 4, "shared": 0.0})


def test_taking_over_moves_a_model_s_outputs_less():
    model = make_model({"every": 2})
    whole = logits(model)
    errors = [float((logits(narrowed(model, 0.75, noticed(model, gram))[0]) - whole).norm()) for gram in (True, False)]
    assert errors[0] < 0.8 * errors[1]


def test_an_expert_that_saw_too_little_is_judged_by_its_weights_and_named():
    model = make_model({"every": 1}, layers=1)
    met = noticed(model)[0]
    met["ffn.experts.w_out"][2] = Seen.nothing(16, True)
    block = deepcopy(model.blocks[0])
    notes = narrow_block(block, narrower(model.cfg, 0.5), met, min_rows=1)
    assert notes["unseen"] == [2]
    assert [lost is None for lost in notes["lost"]["experts"]] == [False, False, True, False]
    own = model.blocks[0].ffn.experts
    alone = choose(own.w_in[2], own.w_out[2], 8, None)
    assert block.ffn.experts.w_out[2].equal(alone.w_out_SD)
    notes = narrow_block(deepcopy(model.blocks[0]), narrower(model.cfg, 0.5), met, min_rows=10**6)
    assert notes["unseen"] == [0, 1, 2, 3]


def test_units_that_never_spoke_are_no_division_by_zero():
    silent = seen(torch.zeros(5, F))
    found = choose(torch.randn(2 * F, D), torch.randn(F, D), 10, silent)
    assert found.w_out_SD.isfinite().all()
    assert found.lost == 0


def test_widths_are_shares_and_stay_multiples_of_64():
    wide = make_config({"expert_width": 512, "shared_experts": 2}, ffn_width=1536)
    half = narrower(wide, 0.3)
    assert (half.ffn_width, half.moe.expert_width, half.moe.shared_width) == (448, 128, 320)
    assert narrower(wide, 0.5).moe.shared_width is None  # it follows the experts'
    assert narrower(make_config(None, ffn_width=30), 0.5).ffn_width == 15
    assert narrower(make_config(None), 0.001).ffn_width == 1
    for keep in (0, 1.1, -1):
        with pytest.raises(ConfigError, match=r"keep \(.*\) must lie in \(0, 1\]"):
            narrower(wide, keep)


def test_errors_name_what_does_not_fit():
    model = make_model({"every": 2})
    wider = replace(model.cfg, ffn_width=64)
    with pytest.raises(ConfigError, match=r"hidden \(64\) must lie in 1 to the 32 hidden units"):
        narrow_block(model.blocks[0], wider, {})
    with torch.no_grad():
        model.blocks[0].ffn.w_in.weight[3, 3] = torch.nan
        model.blocks[1].ffn.experts.w_in[0, 3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="w_in of a feed-forward network must be numbers"):
        narrow_block(model.blocks[0], model.cfg, {})
    with pytest.raises(NonFiniteError, match=r"experts.w_in of layer 1 must be numbers"):
        narrow_block(model.blocks[1], model.cfg, {})


def test_hidden_units_that_are_no_numbers_in_calibration_are_an_error():
    seen = Seen.nothing(32, gram=True)
    seen.add(torch.full((3, 32), torch.nan))
    with pytest.raises(NonFiniteError, match="hidden units are in calibration must be numbers"):
        narrow_block(make_model({"every": 2}).blocks[0], make_config({"every": 2}), {"ffn.w_out": [seen]})
