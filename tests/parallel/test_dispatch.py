"""Dispatch and combine: all-to-all gives each rank what one rank holding all experts would compute.

T tokens, D width, E experts, K choices, N rows.
"""
# ruff: noqa: N802 (M3 is the name of a rule)

import pytest
import torch

from turnout.parallel import process
from turnout.parallel.config import ParallelConfig
from turnout.parallel.dispatch.all_to_all import AllToAllDispatcher
from turnout.parallel.dispatch.local import LocalDispatcher
from turnout.parallel.dispatch.traffic import Traffic
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks

WIDTH, EXPERTS = 6, 4


def tokens_of(rank: int, case: str, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """This rank's hidden states, expert ids, weights and kept mask."""
    tokens = {"even": 8, "uneven": 5 + 8 * rank, "one rank empty": 9 * rank, "all empty": 0}.get(case, 7)
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD = torch.randn(tokens, WIDTH, generator=generator, dtype=dtype)
    ids_TK = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :top_k]
    weights_TK = torch.rand(tokens, top_k, generator=generator)
    kept_TK = torch.rand(tokens, top_k, generator=generator) < 0.7
    if case == "hot expert":
        ids_TK[:, 0] = 1
    if case == "all dropped":
        kept_TK[:] = False
    return x_TD, ids_TK, weights_TK, kept_TK


def expert_rows(rows_ND: torch.Tensor, ends_E: torch.Tensor, scale_EDD: torch.Tensor) -> torch.Tensor:
    """A stand-in for the experts: rows of expert e times its matrix."""
    starts = [0, *ends_E.tolist()[:-1]]
    return torch.cat([rows_ND[a:b] @ w for a, b, w in zip(starts, ends_E.tolist(), scale_EDD, strict=True)])


def mix(dispatcher, first: int, last: int, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Forward and backward through experts `first` to `last`; the outputs and all gradients."""
    x_TD, ids_TK, weights_TK, kept_TK = inputs
    matrices = torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)).to(x_TD.dtype)
    w_EDD = matrices[first:last].requires_grad_()
    x_TD, weights_TK = x_TD.requires_grad_(), weights_TK.requires_grad_()
    sent = dispatcher.dispatch(x_TD, ids_TK, kept_TK, EXPERTS)
    y_TD = dispatcher.combine(sent, lambda rows, ends, keys: expert_rows(rows, ends, w_EDD), weights_TK)
    y_TD.float().square().sum().backward()
    parts = {"y": y_TD, "x.grad": x_TD.grad, "weights.grad": weights_TK.grad, "w.grad": w_EDD.grad}
    return {name: part.detach() for name, part in parts.items()}


def all_to_all(case: str, top_k: int, dtype: torch.dtype, how: dict | None = None) -> dict[str, torch.Tensor]:
    mesh = build_mesh(ParallelConfig(ep=process.world(), **how or {}), num_experts=EXPERTS)
    local = EXPERTS // mesh.ep_size
    dispatcher = AllToAllDispatcher(mesh, EXPERTS, Traffic())
    first = local * mesh.ep_rank
    return mix(dispatcher, first, first + local, tokens_of(mesh.rank, case, top_k, dtype))


CASES = ["even", "uneven", "one rank empty", "all empty", "hot expert", "all dropped"]


@pytest.mark.parametrize(("top_k", "world"), [(1, 2), (2, 2), pytest.param(2, 4, marks=pytest.mark.full)])
@pytest.mark.parametrize("case", CASES)
def test_all_to_all_equals_one_rank_with_all_experts(case, top_k, world):
    spread = run_ranks(all_to_all, world, case, top_k, torch.float64)
    batches = [tokens_of(rank, case, top_k, torch.float64) for rank in range(world)]
    whole = mix(LocalDispatcher(), 0, EXPERTS, tuple(map(torch.cat, zip(*batches, strict=True))))
    for name, expected in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in spread]), expected, rtol=1e-12, atol=1e-12)


WAYS = {
    "chunks": {"chunks": 3},
    "rounds": {"exchange_rows": 5},
    "chunks in rounds": {"chunks": 2, "exchange_rows": 5},
    "nodes": {"node": 2},
    "chunks through nodes": {"node": 2, "chunks": 2},
    "rounds through nodes": {"node": 2, "exchange_rows": 6, "chunks": 2},
}


def ways(case: str) -> dict[str, dict[str, torch.Tensor]]:
    fits = {name: how for name, how in WAYS.items() if process.world() % how.get("node", 1) == 0}
    return {name: all_to_all(case, 2, torch.float64, how) for name, how in ({"one step": {}} | fits).items()}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.full), 4])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in ("uneven", "hot expert") else pytest.mark.full) for case in CASES]
)
def test_every_way_leads_to_the_same_results(case, world):
    for found in run_ranks(ways, world, case):
        one_step = found.pop("one step")
        for name, way in found.items():
            for part, expected in one_step.items():
                if name == "nodes" or part == "y":
                    assert torch.equal(way[part], expected), (name, part)  # the same rows in the same places
                torch.testing.assert_close(way[part], expected, rtol=1e-12, atol=1e-12, msg=f"{part}, {name}")


def sizes_of_messages() -> list[tuple[int, list[int]]]:
    """Ranks and rows of each leg of this rank's rows: three to every expert, of four ranks in two nodes."""
    mesh = build_mesh(ParallelConfig(ep=4, node=2), num_experts=EXPERTS)
    ids_TK = torch.arange(EXPERTS).repeat(3)[:, None]
    dispatcher = AllToAllDispatcher(mesh, EXPERTS, Traffic())
    sent = dispatcher.dispatch(torch.ones(len(ids_TK), WIDTH), ids_TK, torch.ones_like(ids_TK, dtype=bool), EXPERTS)
    found = [(leg.group.size(), leg.sent) for leg in sent.caravans[0].part.legs]
    dispatcher.combine(sent, lambda rows, ends, keys: rows, torch.ones(ids_TK.shape))
    return found


def test_a_message_between_nodes_has_the_rows_of_a_whole_node():
    assert run_ranks(sizes_of_messages, 4) == [[(2, [6, 6]), (2, [6, 6])]] * 4  # not 3 rows for each of two ranks


def test_bfloat16_rows_travel_as_bfloat16():
    spread = run_ranks(all_to_all, 2, "uneven", 2, torch.bfloat16)
    for rank, part in enumerate(spread):
        alone = mix(LocalDispatcher(), 0, EXPERTS, tokens_of(rank, "uneven", 2, torch.bfloat16))
        torch.testing.assert_close(part["y"], alone["y"], rtol=0.02, atol=0.05)
        assert part["y"].dtype == torch.bfloat16


def arrived(dispatcher, x_TD, ids_TK, kept_TK, key_TK=None) -> tuple[list, list, list]:
    """First column of the rows that reach the experts here, their ends, and their keys."""
    seen = [], [], []

    def experts(rows_ND, ends_E, key_N):
        for found, here in zip(seen, (rows_ND[:, 0], ends_E, key_N), strict=True):
            found.extend([] if here is None else here.tolist())
        return rows_ND

    sent = dispatcher.dispatch(x_TD, ids_TK, kept_TK, EXPERTS, key_TK)
    dispatcher.combine(sent, experts, torch.ones(ids_TK.shape))
    return seen


def rows_by_source() -> tuple[list[float], list[int]]:
    """Each token carries rank * 100 + its index; 4 experts, 2 on each rank."""
    mesh = build_mesh(ParallelConfig(ep=2))
    x_T1 = torch.arange(3.0)[:, None] + 100 * mesh.rank
    ids_T1 = torch.tensor([[3], [0], [3]]) if mesh.rank == 0 else torch.tensor([[2], [3], [1]])
    return arrived(AllToAllDispatcher(mesh, EXPERTS, Traffic()), x_T1, ids_T1, torch.ones_like(ids_T1, dtype=bool))[:2]


def test_rows_arrive_by_local_expert_then_source_rank_then_token():
    assert run_ranks(rows_by_source, 2) == [([1.0, 102.0], [1, 2]), ([100.0, 0.0, 2.0, 101.0], [1, 4])]


def carried() -> tuple[list[int], list[float]]:
    """Keys and rows of the same assignments."""
    mesh = build_mesh(ParallelConfig(ep=process.world()), num_experts=EXPERTS)
    _, ids_TK, _, kept_TK = tokens_of(mesh.rank, "uneven", 2, torch.float64)
    key_TK = torch.arange(ids_TK.numel()).view_as(ids_TK) + 1000 * mesh.rank
    rows_TD = key_TK[:, :1].double().expand(-1, WIDTH).contiguous()  # a row says which token it is of
    local = LocalDispatcher()
    dispatcher = AllToAllDispatcher(mesh, EXPERTS, Traffic()) if mesh.ep_size > 1 else local
    rows, _, keys = arrived(dispatcher, rows_TD, ids_TK, kept_TK, key_TK)
    return keys, rows


@pytest.mark.parametrize("world", [1, 2])
def test_an_integer_of_each_assignment_arrives_with_its_row(world):
    found = run_ranks(carried, world)
    keys = [key for keys, _ in found for key in keys]
    assert (
        len(set(keys)) == len(keys) == sum(int(tokens_of(r, "uneven", 2, torch.float64)[3].sum()) for r in range(world))
    )
    for keys, rows in found:
        assert [key - key % 2 for key in keys] == rows


class Noted(torch.autograd.Function):
    """x as it is; notes when it passes forward and when its gradient passes backward."""

    @staticmethod
    def forward(ctx, x, name, log):
        ctx.name, ctx.log = name, log
        log.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.log.append(ctx.name)
        return grad, None, None


def order_of_events() -> tuple[list[str], list[str]]:
    """When exchanges start and are waited for, in a layer of two chunks with something computed beside it."""
    log: list[str] = []

    class Logged(Traffic):
        def started(self, work, sent, device):
            log.append("start")

        def wait(self, work, device):
            log.append("wait")
            work.wait()

    mesh = build_mesh(ParallelConfig(ep=2, chunks=2), num_experts=EXPERTS)
    dispatcher = AllToAllDispatcher(mesh, EXPERTS, Logged())
    x_TD, ids_TK, weights_TK, kept_TK = tokens_of(mesh.rank, "even", 2, torch.float64)
    x_TD.requires_grad_()
    sent = dispatcher.dispatch(x_TD, ids_TK, kept_TK, EXPERTS)
    beside_TD = Noted.apply(x_TD, "shared", log)
    y_TD = dispatcher.combine(sent, lambda rows, ends, keys: Noted.apply(rows, "experts", log), weights_TK)
    forward = log.copy()
    (y_TD + beside_TD).sum().backward()
    return forward, log[len(forward) :]


def test_chunks_travel_while_others_and_the_shared_expert_are_computed_and_the_backward_pass_mirrors_it():
    forward = ["start", "start", "shared", "wait", "experts", "start", "wait", "experts", "start", "wait", "wait"]
    swapped = {"start": "wait", "wait": "start"}
    backward = [swapped.get(event, event) for event in reversed(forward)]
    assert run_ranks(order_of_events, 2) == [(forward, backward)] * 2


UNEVEN = 8


def spread_unevenly(case: str, how: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """8 experts on 3 ranks, top-2: this rank's y, and the ends of the rows that its experts got in the first part."""
    mesh = build_mesh(ParallelConfig(ep=3, **how))
    dispatcher = AllToAllDispatcher(mesh, UNEVEN, Traffic())
    held = dispatcher.shares
    assert held == [3, 3, 2]
    first = sum(held[: mesh.ep_rank])
    matrices = torch.randn(UNEVEN, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine, seen = matrices[first : first + held[mesh.ep_rank]], []

    def experts(rows, ends, keys):
        seen.append(ends)
        return expert_rows(rows, ends, mine)

    x_TD, ids_TK, weights_TK, kept_TK = uneven_inputs(mesh.rank, case)
    sent = dispatcher.dispatch(x_TD, ids_TK, kept_TK, UNEVEN)
    return dispatcher.combine(sent, experts, weights_TK), seen[0]


def uneven_inputs(rank: int, case: str) -> tuple[torch.Tensor, ...]:
    x_TD, ids_TK, weights_TK, kept_TK = tokens_of(rank, case, 2, torch.float64)
    ids_TK = ids_TK + 4 * (torch.arange(len(ids_TK))[:, None] % 2)  # all 8 experts
    return x_TD, ids_TK * 0 + torch.tensor([7, 6]) if case == "hot expert" else ids_TK, weights_TK, kept_TK


@pytest.mark.parametrize("how", [{}, pytest.param({"chunks": 2, "exchange_rows": 5}, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("case", ["uneven", "one rank empty", "all empty", "hot expert"])
def test_M3_experts_that_the_ranks_do_not_divide_give_what_one_rank_gives(case, how):
    spread = run_ranks(spread_unevenly, 3, case, how)
    batches = [uneven_inputs(rank, case) for rank in range(3)]
    x_TD, ids_TK, weights_TK, kept_TK = map(torch.cat, zip(*batches, strict=True))
    matrices = torch.randn(UNEVEN, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    local = LocalDispatcher()
    sent = local.dispatch(x_TD, ids_TK, kept_TK, UNEVEN)
    whole = local.combine(sent, lambda rows, ends, keys: expert_rows(rows, ends, matrices), weights_TK)
    torch.testing.assert_close(torch.cat([y for y, _ in spread]), whole, rtol=1e-12, atol=1e-12)
    if case == "hot expert":
        assert [int(ends[-1]) for _, ends in spread[:2]] == [0, 0], "all went to the last rank's experts"
