"""Loading: nothing that changed since it was written gets in."""

import hashlib
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch

from turnout import CheckpointError
from turnout.parallel.checkpoint import latest, open_checkpoint, restore, save
from turnout.parallel.checkpoint.manifest import (
    DamageError,
    FileEntry,
    Slice,
    TensorEntry,
    decode,
    encode,
)
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import build_mesh
from turnout.parallel.shard import ShardSpec
from turnout.tests.helpers.ranks import run_ranks

WIDE = torch.arange(24.0).view(4, 6)


def spec(tensor):
    return ShardSpec(tuple(tensor.shape), (0,) * tensor.ndim)


def tensors():
    values = {"model/a": WIDE, "model/b": torch.ones(3, dtype=torch.bfloat16), "optim/a/step": torch.tensor(4.0)}
    return {name: (tensor.clone(), spec(tensor)) for name, tensor in values.items()}


def write(root, step=1, keep=None):
    return save(root, step, tensors(), {"step": step}, build_mesh(ParallelConfig()), keep=keep)


def only_file(path):
    return path / "rank-00000.safetensors"


def test_two_hundred_bit_flips_are_two_hundred_refusals_with_both_digests(tmp_path):
    path = write(tmp_path)
    rng = random.Random(7)
    files = sorted(path.iterdir())
    refused = 0
    for number in range(200):
        file = files[number % len(files)]
        raw = file.read_bytes()
        broken = bytearray(raw)
        bit = rng.randrange(8 * len(raw))
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=file.name) as error:
            open_checkpoint(path)
        if file.suffix == ".safetensors":
            assert "sha256" in str(error.value)
            assert "written" in str(error.value)
        refused += 1
        file.write_bytes(raw)
    assert refused == 200
    open_checkpoint(path)


def truncate(path):
    only_file(path).write_bytes(only_file(path).read_bytes()[:-1])


def swap_content(path):
    """The shard of another step: right name, right size, right header."""
    other = save(
        path.parent / "other", 9, {n: (t + 1, s) for n, (t, s) in tensors().items()}, {}, build_mesh(ParallelConfig())
    )
    shutil.copy(only_file(other), only_file(path))


def swap_ranks(path):
    """Each of two files under the other's name: as a wrong shard."""
    write_of_two(path.parent / "two", 2)
    other = path.parent / "two" / path.name
    shutil.rmtree(path)
    other.rename(path)
    first, second = sorted(path.glob("rank-*"))
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)


def write_of_two(root, step):
    run_ranks(write_half, 2, root, step)


def write_half(root, step):
    mesh = build_mesh(ParallelConfig(ep=2))
    half = WIDE[2 * mesh.ep_rank :][:2].clone()
    save(root, step, {"model/a": (half, ShardSpec((4, 6), (2 * mesh.ep_rank, 0)))}, {}, mesh)


def reseal(path, file: bytes, **changes):
    """What an attacker who knows the format writes: another file, and a manifest that fits it."""
    only_file(path).write_bytes(file)
    manifest = decode((path / "manifest.json").read_bytes(), "m")
    entry = FileEntry(bytes=len(file), sha256=hashlib.sha256(file).hexdigest())
    sealed = replace(manifest, files={only_file(path).name: entry}, **changes)
    (path / "manifest.json").write_bytes(encode(sealed))


def safetensors_of(header: str, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def duplicate_name(path):
    one = '"model/a":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}'
    header = "{" + one % (1, 0, 4) + "," + one % (2, 4, 12) + "}"
    tensors = {"model/a": TensorEntry(dtype="F32", shape=(1,), slices=(whole_slice(path, (1,)),))}
    reseal(path, safetensors_of(header, bytes(12)), tensors=tensors)


def bomb(path):
    """A few bytes that say they are 4 TiB."""
    size = 2**40
    header = json.dumps({"model/a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4]}})
    tensors = {"model/a": TensorEntry(dtype="F32", shape=(size,), slices=(whole_slice(path, (size,)),))}
    reseal(path, safetensors_of(header, bytes(4)), tensors=tensors)


def whole_slice(path, shape):
    return Slice(file=only_file(path).name, offset=(0,) * len(shape), shape=shape)


def pickled(path):
    """The file itself is a pickle, and the manifest fits it."""
    torch.save({"a": torch.ones(1)}, path / "aside")
    reseal(path, (path / "aside").read_bytes())
    (path / "aside").unlink()


def sparse_file(path):
    """The right size, all holes."""
    size = only_file(path).stat().st_size
    with only_file(path).open("r+b") as file:
        file.truncate(0)
        file.truncate(size)


DAMAGE = {
    "wrong shard": (swap_ranks, "has changed"),
    "duplicate name": (duplicate_name, "model/a"),
    "bomb": (bomb, "can not be read"),
    "a pickle for a file": (pickled, "can not be read"),
    "all holes": (sparse_file, "has changed"),
    "truncated": (truncate, "should have"),
    "grown": (lambda p: only_file(p).write_bytes(only_file(p).read_bytes() + b"\0"), "should have"),
    "emptied": (lambda p: only_file(p).write_bytes(b""), "should have"),
    "missing": (lambda p: only_file(p).unlink(), "misses rank-00000.safetensors"),
    "renamed": (lambda p: only_file(p).rename(p / "rank-00001.safetensors"), "misses rank-00000"),
    "step renamed": (lambda p: shutil.copytree(p.parent / "step-00000001", p, dirs_exist_ok=True), "holds step 1"),
    "of another step": (swap_content, "has changed"),
    "extra file": (lambda p: (p / "rank-00001.safetensors").write_bytes(b"x"), "has the unexpected rank-00001"),
    "planted pickle": (lambda p: torch.save({"a": torch.ones(1)}, p / "model.pt"), "has the unexpected model.pt"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json"),
    "empty manifest": (lambda p: (p / "manifest.json").write_bytes(b""), "not a manifest"),
    "a directory as file": (lambda p: (only_file(p).unlink(), only_file(p).mkdir()), "rank-00000"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name_and_the_earlier_one_is_taken(tmp_path, kind):
    damage, message = DAMAGE[kind]
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
    assert latest(tmp_path).step == 1
    assert not path.exists()
    moved = tmp_path / "quarantine" / path.name
    assert message in (moved / "reason.txt").read_text()


def test_sizes_alone_do_not_see_a_bit_flip_but_headers_are_always_checked(tmp_path):
    path = write(tmp_path)
    raw = only_file(path).read_bytes()
    only_file(path).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    open_checkpoint(path, verify="size")
    only_file(path).write_bytes(raw.replace(b'"shape":[4,6]', b'"shape":[6,4]'))
    with pytest.raises(CheckpointError, match=r"model/a\) is not as manifest"):
        open_checkpoint(path, verify="size")


def test_a_manifest_whose_slices_leave_holes_is_refused(tmp_path):
    path = write(tmp_path)
    manifest = decode((path / "manifest.json").read_bytes(), "m")
    manifest.tensors["model/a"] = replace(manifest.tensors["model/a"], shape=(8, 6))
    (path / "manifest.json").write_bytes(encode(manifest))
    with pytest.raises(DamageError, match=r"model/a \(24 elements on all ranks\) must have 48"):
        open_checkpoint(path)


def test_a_renamed_checkpoint_directory_is_refused(tmp_path):
    path = write(tmp_path, 1)
    path.rename(tmp_path / "step-00000007")
    with pytest.raises(CheckpointError, match="holds step 1: it was renamed"):
        open_checkpoint(tmp_path / "step-00000007")


def test_the_newest_is_taken_and_other_names_are_none_of_its_business(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path, step)
    for name in ("step-99", "step-00000099.bak", "step-0000009x", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000098").write_text("a file")
    assert latest(tmp_path).step == 10
    assert not (tmp_path / "quarantine").exists()
    assert (tmp_path / "notes").exists()


def test_nothing_saved_is_none_but_nothing_usable_is_an_error(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    truncate(write(tmp_path, 1))
    truncate(write(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies"):
        latest(tmp_path)
    assert len(list((tmp_path / "quarantine").iterdir())) == 2
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is damaged: see .*step-00000002"):
        latest(tmp_path)


def test_quarantine_never_overwrites(tmp_path):
    write(tmp_path, 1)
    for _ in range(3):
        truncate(write(tmp_path, 2))
        assert latest(tmp_path).step == 1
    names = [f"step-00000002{end}" for end in ("", "-1", "-2")]
    assert sorted(p.name for p in (tmp_path / "quarantine").iterdir()) == names


def test_any_block_can_be_read(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path))
    for offset, shape in [((0, 0), (4, 6)), ((1, 2), (2, 3)), ((3, 5), (1, 1)), ((0, 0), (0, 6)), ((4, 0), (0, 6))]:
        expected = WIDE[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
        assert torch.equal(checkpoint.read("model/a", ShardSpec((4, 6), offset), shape), expected)
    assert checkpoint.read_all("model/b").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "where", "shape", "message"),
    [
        ("model/zzz", ShardSpec((4, 6), (0, 0)), (4, 6), "model/zzz is not in"),
        ("model/a", ShardSpec((6, 4), (0, 0)), (6, 4), r"model/a \(6, 4\) is \(4, 6\)"),
        ("model/a", ShardSpec((4, 6), (3, 0)), (2, 6), "must lie in"),
    ],
)
def test_a_block_that_does_not_exist_is_refused(tmp_path, name, where, shape, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path)).read(name, where, shape)


def change(name, tensor):
    return {**tensors(), name: (tensor, spec(tensor))}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (change("model/new", torch.ones(1)), "model/new is not in"),
        (change("model/a", torch.zeros(4, 6, dtype=torch.float64)), "model/a"),
        (change("model/a", torch.zeros(6, 4)), "model/a"),
        ({k: v for k, v in tensors().items() if k != "model/b"}, r"model/b \(1 in all\) .* has no place"),
    ],
)
def test_restore_is_strict_and_changes_nothing_when_it_refuses(tmp_path, wanted, message):
    checkpoint = open_checkpoint(write(tmp_path))
    wanted = {name: (torch.full_like(tensor, 7), where) for name, (tensor, where) in wanted.items()}
    with pytest.raises(CheckpointError, match=message):
        restore(checkpoint, wanted)
    assert all(bool((tensor == 7).all()) for tensor, _ in wanted.values())


def test_restore_can_take_one_part(tmp_path):
    wanted = {name: (torch.zeros_like(t), s) for name, (t, s) in tensors().items() if name.startswith("model/")}
    restore(open_checkpoint(write(tmp_path)), wanted, prefix="model/")
    assert torch.equal(wanted["model/a"][0], WIDE)


def pick(root):
    try:
        found = latest(root)
    except CheckpointError as error:
        return str(error)
    return found and found.step


def test_all_ranks_take_the_same_one_and_one_of_them_moves_the_bad(tmp_path):
    assert run_ranks(pick, 2, tmp_path) == [None, None]
    write(tmp_path, 1)
    truncate(write(tmp_path, 2))
    assert run_ranks(pick, 2, tmp_path) == [1, 1]
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    truncate(tmp_path / "step-00000001")
    first, second = run_ranks(pick, 2, tmp_path)
    assert first == second
    assert "verifies" in first


def test_the_verification_time_is_told(tmp_path):
    assert open_checkpoint(write(tmp_path)).seconds > 0
