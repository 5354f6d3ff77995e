"""Fewer experts: those that compute alike become one (M-SMoE 2310.01334, HC-SMoE 2410.08589).

1. Clusters: starting from single experts, the two whose merger moves the layer's output least become one, until so many
   are left. With loads n and mean squared distance d² of their outputs on the same rows, one that gives the
   load-weighted mean of two costs n_a · n_b / (n_a + n_b) · d² (Ward's method). So experts without tokens go first.
2. Weights: the load-weighted mean of a cluster, after each expert's hidden units were put in the order of those of the
   busiest that they match best (2209.04836 §3.2): a permutation of hidden units changes no output, but any mean.
3. Router: p of the cluster should be the sum of its experts', so its logit log Σ exp of theirs. No linear map gives
   that exactly; the row is the least-squares fit on calibration, drawn to the load-weighted mean of the rows.
   Everything else that routers have by expert (biases, noise) is that mean.

T tokens, R rows, D width, E experts, C clusters, F hidden width, H = 2F or F.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...configs.typed import check
from ..layers.block import Block
from ..layers.moe import MoE
from .experts import fewer, finite, of_experts, rebuilt
from .routed import Routed, expert_output

ROWS = 512  # on which all experts are compared
RIDGE = 1e-2  # of the router's fit, as a share of the rows' mean square
LEAST = 1e-6  # what an expert without tokens weighs, as a share of all load


def merge_experts(block: Block, experts: int, routed: Routed) -> dict[str, Any]:
    """Merge the experts of the sparse block into so many, in place.

    Returns:
        clusters: which old experts each new one is made of; unseen: ids of those that calibration sent nothing.

    Raises:
        ConfigError: as `fewer`; of a hash router, whose tokens stay together only where `experts` divides the old
            number. NonFiniteError: a weight is not a number.
    """
    moe = block.ffn
    assert isinstance(moe, MoE)
    fewer(moe.cfg, experts)
    finite(moe)
    owner_E = clusters(moe, experts, routed)
    block.ffn = merged(moe, owner_E, routed)
    members = [(owner_E == cluster).nonzero().flatten().tolist() for cluster in range(experts)]
    return {"clusters": members, "unseen": (routed.load_E == 0).nonzero().flatten().tolist()}


def clusters(moe: MoE, experts: int, routed: Routed) -> Tensor:
    """int64 [E]: the new expert that each becomes a part of; ordered by the lowest old id, within the router's groups.

    Raises:
        ConfigError: of a hash router, if `experts` does not divide the number there is.
    """
    count, groups = moe.cfg.num_experts, moe.cfg.expert_groups
    if moe.cfg.router == "hash":
        rule = f"must divide moe.num_experts ({count}): the hash modulo it then puts whole experts together"
        check(count % experts == 0, "num_experts", experts, rule, f"use {count // 2}")
        return torch.arange(count) % experts
    weight_E, distance_EE = _weights(routed.load_E), distances(moe, routed.rows_TD)
    size, owner_E = count // groups, torch.empty(count, dtype=torch.int64)
    for group in range(groups):
        own = slice(group * size, (group + 1) * size)
        found = ward(distance_EE[own, own], weight_E[own], experts // groups)
        owner_E[own] = found + group * (experts // groups)
    return owner_E


def distances(moe: MoE, rows_TD: Tensor) -> Tensor:
    """float64 [E, E]: mean squared distance of two experts' outputs, on at most `ROWS` rows, evenly spaced."""
    rows_RD = rows_TD[:: -(-len(rows_TD) // ROWS)]
    y_ERD = torch.stack([expert_output(moe, expert, rows_RD) for expert in range(moe.cfg.num_experts)])
    y_EN = y_ERD.flatten(1).double()
    gram_EE = y_EN @ y_EN.mT
    square_E = gram_EE.diagonal()
    return (square_E[:, None] + square_E - 2 * gram_EE).clamp(min=0) / len(rows_RD)


def ward(distance_EE: Tensor, weight_E: Tensor, count: int) -> Tensor:
    """int64 [E]: agglomerative clusters, numbered by their lowest member.

    Args:
        distance_EE: squared distances.
        weight_E: positive.
        count: how many are left.
    """
    distance_EE, weight_E = distance_EE.clone(), weight_E.clone()
    owner_E = torch.arange(len(weight_E))
    gone_E = torch.zeros(len(weight_E), dtype=torch.bool)
    for _ in range(len(weight_E) - count):
        cost_EE = distance_EE * weight_E[:, None] * weight_E / (weight_E[:, None] + weight_E)
        cost_EE[gone_E] = cost_EE[:, gone_E] = torch.inf
        a, b = divmod(int(cost_EE.fill_diagonal_(torch.inf).argmin()), len(weight_E))
        a, b = min(a, b), max(a, b)
        share, whole = weight_E[b] / (weight_E[a] + weight_E[b]), weight_E[a] + weight_E[b]
        # the distance to the mean of two points, of the distances to them (Lance & Williams)
        row_E = (1 - share) * distance_EE[a] + share * distance_EE[b] - share * (1 - share) * distance_EE[a, b]
        distance_EE[a] = distance_EE[:, a] = row_E
        weight_E[a], gone_E[b] = whole, True
        owner_E[owner_E == b] = a
    return owner_E.unique(return_inverse=True)[1]


def merged(moe: MoE, owner_E: Tensor, routed: Routed) -> MoE:
    """The layer whose expert c is made of the experts e with owner[e] = c; one alone stays as it is, to the bit."""
    tensors = finite(moe)
    weight_E, members = _weights(routed.load_E), [(owner_E == c).nonzero().flatten() for c in owner_E.unique()]
    order_EF = torch.arange(moe.cfg.expert_width).repeat(moe.cfg.num_experts, 1)
    for member_M in members:
        busiest = int(member_M[weight_E[member_M].argmax()])
        for expert in member_M.tolist():
            if expert != busiest:
                order_EF[expert] = matching(*(units(moe, one) for one in (busiest, expert)))
    changed = {}
    for name, tensor in of_experts(tensors):
        ordered = [_ordered(name, part, order_F) for part, order_F in zip(tensor, order_EF, strict=True)]
        changed[name] = _means(ordered, weight_E, members)
    if "router.weight" in changed:
        changed["router.weight"] = router_rows(moe, changed["router.weight"], members, routed)
    return rebuilt(moe, fewer(moe.cfg, len(members)), changed)


@torch.no_grad()
def units(moe: MoE, expert: int) -> Tensor:
    """[F, ...]: everything that belongs to each hidden unit: its gate and up rows, its output row."""
    w_in_HD, w_out_FD = moe.experts.w_in[expert], moe.experts.w_out[expert]
    hidden = len(w_out_FD)
    return torch.cat((*w_in_HD.unflatten(0, (-1, hidden)), w_out_FD), 1).float()


def matching(a_FU: Tensor, b_FU: Tensor) -> Tensor:
    """int64 [F]: for each unit of `a` one of `b`, each once, most alike first (greedy).

    In every round all pairs of which each is the other's best are taken; alike is the inner product.
    """
    alike_FF = a_FU @ b_FU.mT
    found_F = torch.full((len(a_FU),), -1)
    while bool((found_F < 0).any()):
        for_a_F, for_b_F = alike_FF.argmax(1), alike_FF.argmax(0)
        taken = (for_b_F[for_a_F] == torch.arange(len(a_FU))) & (found_F < 0)
        found_F[taken] = for_a_F[taken]
        alike_FF[taken] = -torch.inf
        alike_FF[:, for_a_F[taken]] = -torch.inf
    return found_F


@torch.no_grad()
def router_rows(moe: MoE, mean_CD: Tensor, members: Sequence[Tensor], routed: Routed) -> Tensor:
    """Rows [C, D] whose logits are log Σ exp of the clusters' experts', as nearly as rows near the mean ones can."""
    x_TD, rows_CD = routed.rows_TD.double(), mean_CD.clone()
    logits_TE = x_TD @ moe.router.weight.double().mT
    gram_DD = x_TD.mT @ x_TD
    gram_DD += RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.float64)
    for cluster, member_M in enumerate(members):
        if len(member_M) > 1:
            mean_D = mean_CD[cluster].double()
            missing_T = logits_TE[:, member_M].logsumexp(1) - x_TD @ mean_D
            rows_CD[cluster] = (mean_D + torch.linalg.solve(gram_DD, x_TD.mT @ missing_T)).to(rows_CD.dtype)
    return rows_CD


def _weights(load_E: Tensor) -> Tensor:
    return load_E.clamp(min=LEAST * float(load_E.sum()))


def _ordered(name: str, part: Tensor, order_F: Tensor) -> Tensor:
    """One expert's part of a tensor, its hidden units in another order."""
    if name == "experts.w_out":
        return part[order_F]
    if name in ("experts.w_in", "experts.b_in"):
        return part.unflatten(0, (-1, len(order_F)))[:, order_F].flatten(0, 1)
    return part


def _means(parts: Sequence[Tensor], weight_E: Tensor, members: Sequence[Tensor]) -> Tensor:
    """The weighted mean of each cluster's parts, [C, ...]."""
    found = []
    for member_M in members:
        share_M = weight_E[member_M] / weight_E[member_M].sum()
        pairs = zip(share_M.tolist(), member_M.tolist(), strict=True)
        found.append(torch.stack([share * parts[expert].double() for share, expert in pairs]).sum(0))
    return torch.stack(found).to(parts[0].dtype)
