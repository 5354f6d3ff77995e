"""States to save, and processes that die while they save; a module of its own, so that a child can import it."""

import torch

from turnout.parallel.checkpoint import save
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import build_mesh
from turnout.parallel.shard import ShardSpec
from turnout.tests.parallel.checkpoint.flaky import FlakyDisk


def whole(tensor):
    return tensor, ShardSpec(tuple(tensor.shape), (0,) * tensor.ndim)


def state(step, size=64):
    generator = torch.Generator().manual_seed(step)
    return {
        "model/w": whole(torch.rand(size, 3, generator=generator)),
        "optim/w/step": whole(torch.tensor(float(step))),
    }


def write(root, step, **options):
    return save(root, step, state(step), {"step": step}, build_mesh(ParallelConfig()), **options)


def save_and_die(root, at):
    write(root, 1, keep=1, disk=FlakyDisk(at, "kill"))


def save_for_ever(root, said):
    for step in range(1, 100_000):
        save(root, step, state(step, 20_000), {"step": step}, build_mesh(ParallelConfig()))
        said.send(step)
