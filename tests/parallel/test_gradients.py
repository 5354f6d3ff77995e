"""The global norm counts every parameter once, at every layout; the clip follows its formula."""

import pytest
import torch

from turnout.parallel.config import ParallelConfig
from turnout.parallel.gradients import clip_coefficient, global_norm
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks

DENSE = torch.tensor([3.0, 4.0])
EXPERTS_E2 = torch.tensor([[1.0, 2.0], [0.5, 0.0], [2.0, 2.0], [0.0, 7.0]])


def norm_at(ep: int) -> float:
    mesh = build_mesh(ParallelConfig(ep=ep))
    local = len(EXPERTS_E2) // ep
    mine = EXPERTS_E2[mesh.ep_rank * local : (mesh.ep_rank + 1) * local]
    return global_norm([(DENSE, mesh.world), (mine, mesh.edp_size)], mesh.device)


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_every_parameter_counts_once(world, ep):
    expected = float(torch.cat([DENSE, EXPERTS_E2.flatten()]).norm())
    norms = run_ranks(norm_at, world, ep)
    assert norms == pytest.approx([expected] * world, rel=1e-7)
    assert len(set(norms)) == 1, "all ranks must clip alike"


def one_nan() -> float:
    mesh = build_mesh(ParallelConfig(ep=2))
    return global_norm([(torch.tensor([float("nan") if mesh.rank else 1.0]), 1)], mesh.device)


def test_a_nan_on_one_rank_is_seen_by_all():
    assert [norm != norm for norm in run_ranks(one_nan, 2)] == [True, True]


def test_the_clip_coefficient_never_enlarges():
    assert clip_coefficient(4.0, None) == 1.0
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(4.0, 1.0) == 1.0 / (4.0 + 1e-6)
    assert clip_coefficient(0.0, 1.0) == 1.0
