"""Saving: whole or not at all, whatever fails and whenever the process dies."""

import errno
import random
import shutil
import time

import pytest
import torch

from turnout import CheckpointError
from turnout.parallel import process
from turnout.parallel.checkpoint import latest, open_checkpoint, restore, save
from turnout.parallel.checkpoint.writer import Save, committed
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import build_mesh
from turnout.parallel.shard import ShardSpec
from turnout.tests.helpers.forks import context, ends, start
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.parallel.checkpoint.flaky import FlakyDisk, GatedDisk
from turnout.tests.parallel.checkpoint.states import save_and_die, save_for_ever, state, whole, write


def holds(checkpoint):
    """Whether it is exactly the state of its step."""
    expected = state(checkpoint.step)
    return checkpoint.meta == {"step": checkpoint.step} and all(
        torch.equal(checkpoint.read_all(name), tensor) for name, (tensor, _) in expected.items()
    )


def test_what_was_saved_comes_back_bit_by_bit(tmp_path):
    tensors = state(5) | {
        "model/half": whole(torch.rand(3, 4).to(torch.bfloat16)),
        "rng/data": whole(torch.tensor([2**62 + 1, -1])),
        "model/empty": whole(torch.empty(0, 4)),
        "model/t": whole(torch.arange(6.0).view(2, 3).T),
    }
    meta = {"step": 5, "cursor": {"epoch": 1, "row": 2}, "seconds": 0.1, "text": "é"}
    path = save(tmp_path, 5, tensors, meta, build_mesh(ParallelConfig()))
    assert path == tmp_path / "step-00000005"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.meta, checkpoint.names()) == (5, meta, sorted(tensors))
    assert checkpoint.layout == dict.fromkeys(("world", "dp", "ep", "edp", "tp", "pp", "cp"), 1)
    blank = {name: (torch.full_like(tensor, 7), spec) for name, (tensor, spec) in tensors.items()}
    restore(checkpoint, blank)
    for name, (tensor, _) in tensors.items():
        assert torch.equal(blank[name][0], tensor), name


def test_a_committed_directory_is_never_overwritten(tmp_path):
    path = write(tmp_path, 3)
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(CheckpointError, match="never overwritten"):
        write(tmp_path, 3)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_directory_that_appears_during_the_save_is_not_overwritten(tmp_path):
    class Intruder(FlakyDisk):
        def open(self, path):
            (tmp_path / "step-00000003").mkdir(exist_ok=True)
            return super().open(path)

    with pytest.raises(CheckpointError, match="never overwritten"):
        write(tmp_path, 3, disk=Intruder(-1))
    assert list((tmp_path / "step-00000003").iterdir()) == []


def test_the_last_k_committed_and_the_one_in_use_are_kept(tmp_path):
    first = write(tmp_path, 1)
    for step in range(2, 7):
        write(tmp_path, step, keep=2, in_use=first)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (1, 5, 6)]
    write(tmp_path, 7, keep=None)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_checkpoint_on_its_way_out_no_longer_counts_as_one(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError(errno.EIO, "half gone")))
    with pytest.raises(CheckpointError, match=r"step-00000001 can not be removed .*half gone"):
        write(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert [step for step, _ in committed(tmp_path)] == [2]


def test_what_a_dead_save_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "tmp-00000009-aa").mkdir(parents=True)
    (tmp_path / "tmp-00000009-aa" / "rank-00000.safetensors").write_bytes(b"half")
    assert latest(tmp_path) is None
    write(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_every_failing_disk_operation_is_an_error_and_leaves_the_earlier_one(tmp_path):
    counting = FlakyDisk(-1)
    write(tmp_path / "count", 0)
    write(tmp_path / "count", 1, keep=1, disk=counting)
    assert counting.names.count("fsync") >= 4  # two files, the directory before and its parent after the rename
    for at in range(counting.count):
        root = tmp_path / str(at)
        write(root, 0)
        with pytest.raises(CheckpointError, match="No space left on device") as error:
            write(root, 1, keep=1, disk=FlakyDisk(at, errno.ENOSPC))
        assert str(root) in str(error.value)
        found = latest(root)
        assert holds(found)
        assert not list(root.glob("tmp-*"))
        assert not (root / "quarantine").exists()
        published = "rename" in counting.names[:at]
        assert found.step == int(published), (at, counting.names)


def test_a_failed_write_names_path_and_bytes(tmp_path):
    size = (write(tmp_path, 0) / "rank-00000.safetensors").stat().st_size
    text = (
        rf"rank-00000\.safetensors \({size} bytes needed, \d+ written, \d+ free\) can not be saved .*Input/output error"
    )
    with pytest.raises(CheckpointError, match=text):
        write(tmp_path, 1, disk=FlakyDisk(2, errno.EIO))


def test_meta_that_is_not_json_is_refused(tmp_path):
    mesh = build_mesh(ParallelConfig())
    for value in (float("nan"), torch.ones(1)):
        with pytest.raises(CheckpointError, match="meta does not fit JSON"):
            save(tmp_path, 1, state(1), {"value": value}, mesh)
    assert latest(tmp_path) is None


def test_a_type_that_can_not_be_saved_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"z \(torch\.complex64\)"):
        save(tmp_path, 1, {"z": whole(torch.zeros(2, dtype=torch.complex64))}, {}, build_mesh(ParallelConfig()))


def test_dying_at_any_disk_operation_leaves_a_whole_checkpoint(tmp_path):
    counting = FlakyDisk(-1)
    write(tmp_path / "count", 0)
    write(tmp_path / "count", 1, keep=1, disk=counting)
    for at in range(counting.count):
        root = tmp_path / str(at)
        write(root, 0)
        assert ends([start(save_and_die, root, at)]) == [-9]
        found = latest(root)
        assert holds(found)
        assert found.step == int("rename" in counting.names[:at])
        assert holds(open_checkpoint(write(root, 2)))


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.full)])
def test_dying_at_random_times_never_loses_what_was_saved(tmp_path, kills):
    for seed in range(kills):
        root = tmp_path / str(seed)
        ours, theirs = context.Pipe()
        child = start(save_for_ever, root, theirs)
        theirs.close()
        said = ours.recv()
        time.sleep(random.Random(seed).random() * 0.1)
        child.kill()
        child.join(60)
        while ours.poll():
            try:
                said = ours.recv()
            except EOFError:
                break
        found = latest(root)
        assert found.step >= said
        generator = torch.Generator().manual_seed(found.step)
        assert torch.equal(found.read_all("model/w"), torch.rand(20_000, 3, generator=generator))
        assert not (root / "quarantine").exists()


def experts(ep_rank, ep):
    """This rank's slice of [8, 5, 3] expert weights whose every element tells its global place."""
    every = torch.arange(8 * 15, dtype=torch.float32).view(8, 5, 3)
    each = 8 // ep
    return every[ep_rank * each : (ep_rank + 1) * each].clone(), ShardSpec((8, 5, 3), (ep_rank * each, 0, 0))


def sharded(mesh):
    return state(1) | {"model/experts.w_in": experts(mesh.ep_rank, mesh.ep_size)}


def save_with_ep(root, ep):
    mesh = build_mesh(ParallelConfig(ep=ep))
    save(root, 1, sharded(mesh), {"step": 1}, mesh)


def load_with_ep(root, ep):
    mesh = build_mesh(ParallelConfig(ep=ep))
    expected = sharded(mesh)
    blank = {name: (torch.full_like(tensor, -1), spec) for name, (tensor, spec) in expected.items()}
    restore(latest(root), blank)
    return all(torch.equal(blank[name][0], tensor) for name, (tensor, _) in expected.items())


@pytest.mark.parametrize(("world", "ep", "writers"), [(2, 2, [0, 1]), (2, 1, [0]), (1, 1, [0])])
def test_any_layout_reads_what_any_layout_wrote(tmp_path, world, ep, writers):
    if world == 1:
        save_with_ep(tmp_path, ep)
    else:
        run_ranks(save_with_ep, world, tmp_path, ep)
    path = tmp_path / "step-00000001"
    assert sorted(p.name for p in path.glob("rank-*")) == [f"rank-{r:05d}.safetensors" for r in writers]
    pieces = open_checkpoint(path).entry("model/experts.w_in").slices
    assert sorted(e for s in pieces for e in range(s.offset[0], s.offset[0] + s.shape[0])) == list(range(8))
    assert load_with_ep(tmp_path, 1)
    assert run_ranks(load_with_ep, 2, tmp_path, 2) == [True, True]
    assert run_ranks(load_with_ep, 2, tmp_path, 1) == [True, True]


def fail_on_one_rank(root, at):
    mesh = build_mesh(ParallelConfig(ep=2))
    disk = FlakyDisk(at if process.rank() == 1 else -1, errno.EIO)
    try:
        save(root, 2, sharded(mesh), {}, mesh, disk=disk)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_disk_that_fails_on_one_rank_stops_the_save_on_all(tmp_path):
    run_ranks(save_with_ep, 2, tmp_path, 2)
    messages = run_ranks(fail_on_one_rank, 2, tmp_path, 1)
    assert messages[0] == messages[1]
    assert "rank 1:" in messages[0]
    assert "rank-00001.safetensors" in messages[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_with_ep(tmp_path, 1)


def die_on_rank_1(root):
    mesh = build_mesh(ParallelConfig(ep=2))
    disk = FlakyDisk(1 if process.rank() == 1 else -1, "kill")
    save(root, 2, sharded(mesh), {}, mesh, disk=disk)


@pytest.mark.full
def test_a_rank_that_dies_inside_a_save_leaves_the_earlier_one(tmp_path):
    run_ranks(save_with_ep, 2, tmp_path, 2)
    with pytest.raises(AssertionError, match="PeerError"):
        run_ranks(die_on_rank_1, 2, tmp_path, dies=(1,), group_timeout=5.0)
    assert latest(tmp_path).step == 1
    assert load_with_ep(tmp_path, 1)


def disagree(root):
    mesh = build_mesh(ParallelConfig(ep=2))
    tensors = {"w": whole(torch.zeros(2 + process.rank()))}
    try:
        save(root, 2, tensors, {}, mesh)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_ranks_that_disagree_about_a_tensor_are_refused_on_all(tmp_path):
    messages = run_ranks(disagree, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "w is" in messages[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("snapshot", [True, False])
def test_a_save_behind_the_steps_holds_the_moment_it_began(tmp_path, snapshot):
    tensors, disk = state(1), GatedDisk()
    under_way = Save(tmp_path, 1, tensors, {"step": 1}, build_mesh(ParallelConfig()), disk=disk, snapshot=snapshot)
    for tensor, _ in tensors.values():
        tensor.add_(1)
    assert not under_way.written
    assert latest(tmp_path) is None
    disk.gate.set()
    under_way.wait()
    assert latest(tmp_path) is None, "written is not yet saved"
    assert holds(open_checkpoint(under_way.commit())) == snapshot


def test_what_goes_wrong_in_the_thread_is_told_by_commit_whatever_it_is(tmp_path):
    class Broken(FlakyDisk):
        def fsync(self, descriptor):
            raise ValueError("a defect")

    under_way = Save(tmp_path, 1, state(1), {}, build_mesh(ParallelConfig()), disk=Broken(-1), snapshot=True)
    under_way.wait()
    with pytest.raises(CheckpointError, match=r"tmp-00000001-.*a defect"):
        under_way.commit()
    assert not list(tmp_path.iterdir())


def slow_on_rank_1(root):
    mesh = build_mesh(ParallelConfig(ep=2))
    disk = GatedDisk(7.0 if process.rank() == 1 else 0.0)
    return save(root, 1, sharded(mesh), {"step": 1}, mesh, disk=disk).name


@pytest.mark.full
def test_a_disk_that_is_slower_than_the_time_out_is_waited_for(tmp_path):
    assert run_ranks(slow_on_rank_1, 2, tmp_path, group_timeout=3.0) == ["step-00000001"] * 2
