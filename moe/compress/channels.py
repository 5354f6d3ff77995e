"""Narrower feed-forward networks: hidden units go, with their gate and up rows, their biases and their output row.

All networks of a kind get one new width; which units go is each network's, each expert's own. With h = act(W_in · x)
and G = Σ h · hᵀ over calibration, the output without the units R moves least when those that stay, S, take over what
can be foretold of the others (ZipLM 2302.04089 §3, the optimal brain surgeon for whole columns):

    W'_S = W_S + G_SS⁻¹ · G_SR · W_R          a unit's cost before that: ‖w_j‖² / (G⁻¹)_jj

Units go some at a time, the cheapest first, and G⁻¹ follows. Where only Σ h_j² is known, G is diagonal, and nothing is
taken over; without calibration a unit is taken to be as large as its rows of W_in: G_jj = ‖w_in_j‖².

D width, F hidden width, H = 2F or F, S and J of the F units that stay and that go.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import NonFiniteError
from ...configs.typed import check
from ..config import ModelConfig, MoEConfig
from ..layers.block import Block
from ..layers.ffn import FeedForward
from ..layers.moe import MoE
from ..quantization_config import BLOCK
from .experts import finite, rebuilt
from .seen import Seen

DAMP = 1e-2  # added to the diagonal of G, as a share of its mean
TINY = 1e-30  # at least so much
ROUNDS = 64  # in which units go, at most

Met = Mapping[str, Sequence[Seen]]


def narrower(cfg: ModelConfig, keep: float) -> ModelConfig:
    """The configuration with that share of every hidden width: of dense networks, routed experts and shared ones.

    A width that is a multiple of 64 stays one, so that kernels' tiles and quantization's groups still fit.

    Raises:
        ConfigError: `keep` does not lie in (0, 1].
    """
    check(0 < keep <= 1, "keep", keep, "must lie in (0, 1]", "use 0.75")
    moe = None if cfg.moe is None else _narrower(cfg.moe, keep)
    return replace(cfg, ffn_width=_width(cfg.ffn_width, keep), moe=moe)


def narrow_block(block: Block, cfg: ModelConfig, met: Met, min_rows: int = 1) -> dict[str, Any]:
    """Give the block's feed-forward networks the widths of `cfg`, in place.

    Args:
        block: of whole weights.
        cfg: of the narrower model.
        met: by name of a matrix in the block, what went into it in calibration: `ffn.w_out` and `ffn.shared.w_out`, one
            each; `ffn.experts.w_out`, one an expert. What is not there is judged by its weights.
        min_rows: so is a network that met fewer rows.

    Returns:
        lost: by network, the share of Σ ‖W · h‖² by which its output moves; of experts a list, with None where there
        was nothing to measure it by. unseen: ids of experts that were judged by their weights.

    Raises:
        ConfigError: a width above the network's. NonFiniteError: a weight is not a number.
    """
    seen = {name: [one if one.count >= max(min_rows, 1) else None for one in met[name]] for name in met}
    if isinstance(block.ffn, MoE):
        assert cfg.moe is not None
        block.ffn, notes = _narrow_moe(block.ffn, cfg.moe, seen)
        return notes
    assert isinstance(block.ffn, FeedForward)
    block.ffn, lost = _narrow_dense(block.ffn, cfg.ffn_width, cfg.activation, seen.get("ffn.w_out", [None])[0])
    return {"lost": {"ffn": lost}, "unseen": []}


@dataclass(frozen=True)
class Chosen:
    """The units of a network that stay.

    Attributes:
        kept_S: int64 ids, ascending.
        w_out_SD: their output rows, with what they took over.
        lost: the share of Σ ‖W · h‖² by which the output moves; None without calibration.
    """

    kept_S: Tensor
    w_out_SD: Tensor
    lost: float | None


def choose(w_in_HD: Tensor, w_out_FD: Tensor, hidden: int, seen: Seen | None) -> Chosen:
    """Which `hidden` units of a network stay.

    Args:
        w_in_HD: of a gated network the gate's rows before the up projection's.
        w_out_FD: one row a unit.
        hidden: how many.
        seen: what the hidden units were; None = not known.

    Raises:
        ConfigError: more units than there are. NonFiniteError: a hidden unit was not a number.
    """
    units = len(w_out_FD)
    rule = f"must lie in 1 to the {units} hidden units that there are"
    check(1 <= hidden <= units, "hidden", hidden, rule, "lower it")
    gram_FF, whole_FD = _moments(w_in_HD, units, seen), w_out_FD.double()
    if not gram_FF.isfinite().all():
        raise NonFiniteError("what hidden units are in calibration must be numbers: look for a diverged weight")
    kept_S, w_FD = eliminate(gram_FF, whole_FD, hidden)
    moved_FD = w_FD - whole_FD
    energy = float((whole_FD * (gram_FF @ whole_FD)).sum())
    lost = float((moved_FD * (gram_FF @ moved_FD)).sum()) / max(energy, TINY)
    return Chosen(kept_S, w_FD[kept_S].to(w_out_FD.dtype), None if seen is None else lost)


def eliminate(gram_FF: Tensor, w_FD: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """The ids of the `hidden` units that stay, ascending, and W with zeros for the others, in float64."""
    units, w_FD = len(w_FD), w_FD.double().clone()
    damp = (DAMP * gram_FF.diagonal().mean()).clamp(min=TINY)
    inverse_FF = torch.linalg.inv(gram_FF.double() + damp * torch.eye(units, dtype=torch.float64))
    stays_F, step = torch.ones(units, dtype=torch.bool), -(-units // ROUNDS)
    while (left := int(stays_F.sum()) - hidden) > 0:
        cost_F = w_FD.square().sum(1) / inverse_FF.diagonal()
        go_J = cost_F.masked_fill(~stays_F, torch.inf).argsort(stable=True)[: min(step, left)]
        into_FJ = inverse_FF[:, go_J] @ torch.linalg.inv(inverse_FF[go_J][:, go_J])
        w_FD = w_FD - into_FJ @ w_FD[go_J]
        inverse_FF = inverse_FF - into_FJ @ inverse_FF[go_J]
        stays_F[go_J] = False
        w_FD[~stays_F] = 0
    return stays_F.nonzero().flatten(), w_FD


def rows_of(kept_S: Tensor, units: int, rows: int) -> Tensor:
    """The rows of an input matrix with `rows` rows that belong to the units `kept_S` of `units`: gate's, then up's."""
    first_G1 = torch.arange(0, rows, units)[:, None]
    return (first_G1 + kept_S).flatten()


def _moments(w_in_HD: Tensor, units: int, seen: Seen | None) -> Tensor:
    """G, in float64."""
    if seen is None:
        return w_in_HD.double().square().sum(1).unflatten(0, (-1, units)).sum(0).diag()
    return seen.square_D.double().diag() if seen.gram_DD is None else seen.gram_DD.double()


def _narrow_dense(
    ffn: FeedForward, hidden: int, activation: str, seen: Seen | None
) -> tuple[FeedForward, float | None]:
    w_in_HD, w_out_FD = ffn.w_in.weight.detach(), ffn.w_out.weight.detach().mT
    for name, weight in (("w_in", w_in_HD), ("w_out", w_out_FD)):
        if not weight.isfinite().all():
            raise NonFiniteError(f"{name} of a feed-forward network must be numbers: look for a diverged weight")
    chosen = choose(w_in_HD, w_out_FD, hidden, seen)
    with torch.device("meta"):
        made = FeedForward(ffn.w_in.in_features, hidden, activation)
    rows = rows_of(chosen.kept_S, len(w_out_FD), len(w_in_HD))
    state = {"w_in.weight": w_in_HD[rows], "w_out.weight": chosen.w_out_SD.mT.contiguous()}
    made.load_state_dict(state, assign=True)
    return made.train(ffn.training).requires_grad_(ffn.w_in.weight.requires_grad), chosen.lost


def _narrow_moe(moe: MoE, cfg: MoEConfig, seen: Mapping[str, Sequence[Seen | None]]) -> tuple[MoE, dict[str, Any]]:
    """The layer with experts of cfg.expert_width, and shared ones of the width that `cfg` gives them."""
    tensors, units = finite(moe), moe.cfg.expert_width
    w_in_EHD, w_out_EFD = tensors["experts.w_in"], tensors["experts.w_out"]
    known = seen.get("ffn.experts.w_out", [None] * len(w_out_EFD))
    chosen = [
        choose(w_in_HD, w_out_FD, cfg.expert_width, one)
        for w_in_HD, w_out_FD, one in zip(w_in_EHD, w_out_EFD, known, strict=True)
    ]
    rows_EH = [rows_of(one.kept_S, units, w_in_EHD.shape[1]) for one in chosen]
    changed = {"experts.w_out": torch.stack([one.w_out_SD for one in chosen])}
    for name in {"experts.w_in", "experts.b_in"} & tensors.keys():
        changed[name] = torch.stack([part[rows] for part, rows in zip(tensors[name], rows_EH, strict=True)])
    lost: dict[str, Any] = {"experts": [one.lost for one in chosen]}
    if moe.shared is not None:
        hidden = cfg.shared_width or cfg.shared_experts * cfg.expert_width
        shared, lost["shared"] = _narrow_dense(
            moe.shared, hidden, cfg.activation, seen.get("ffn.shared.w_out", [None])[0]
        )
        changed |= {f"shared.{name}": tensor for name, tensor in shared.state_dict().items()}
    unseen = [expert for expert, one in enumerate(known) if one is None]
    return rebuilt(moe, cfg, changed), {"lost": lost, "unseen": unseen}


def _narrower(moe: MoEConfig, keep: float) -> MoEConfig:
    expert_width = _width(moe.expert_width, keep)
    shared = _width(moe.shared_width or moe.shared_experts * moe.expert_width, keep)
    follows = moe.shared_width is None and shared == moe.shared_experts * expert_width
    return replace(moe, expert_width=expert_width, shared_width=None if follows else shared or None)


def _width(width: int, keep: float) -> int:
    """The kept share of a hidden width; 0 of 0."""
    unit = BLOCK if width % BLOCK == 0 else 1
    return min(max(round(width * keep / unit), 1) * unit, width)
