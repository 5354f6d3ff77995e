"""The manifest: sealed, canonical, and strict about what tiles what."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout import CheckpointError
from turnout.parallel.checkpoint.manifest import (
    DamageError,
    FileEntry,
    Manifest,
    Slice,
    TensorEntry,
    check_tiling,
    decode,
    encode,
    merge,
    overlap,
)

EXAMPLE = Manifest(
    step=3,
    layout={"world": 2},
    meta={"text": "é", "seconds": 0.1, "cursor": {"epoch": 0, "row": 8}},
    files={"rank-00000.safetensors": FileEntry(bytes=4, sha256="ab")},
    tensors={
        "w": TensorEntry(
            dtype="F32", shape=(2, 3), slices=(Slice(file="rank-00000.safetensors", offset=(0, 0), shape=(2, 3)),)
        )
    },
)


def test_a_manifest_comes_back_as_it_was():
    assert decode(encode(EXAMPLE), "m") == EXAMPLE


def test_every_single_bit_flip_is_refused():
    raw = encode(EXAMPLE)
    for bit in range(8 * len(raw)):
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamageError):
            decode(bytes(broken), "m")


def test_another_layout_of_the_same_json_is_refused_with_both_digests():
    data = json.loads(encode(EXAMPLE))
    data["step"] = 4
    with pytest.raises(DamageError, match=rf"m has changed \(sha256 [0-9a-f]{{64}}, written {data['sha256']}\)"):
        decode(json.dumps(data, sort_keys=True, indent=1).encode() + b"\n", "m")
    with pytest.raises(DamageError):
        decode(json.dumps(json.loads(encode(EXAMPLE))).encode(), "m")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"{}", b"[" * 100_000, b'{"sha256": 3}'])
def test_other_bytes_are_no_manifest(raw):
    with pytest.raises(DamageError):
        decode(raw, "m")


def test_another_version_is_refused_but_is_no_damage(monkeypatch):
    monkeypatch.setattr("turnout.parallel.checkpoint.manifest.VERSION", 2)
    raw = encode(EXAMPLE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 1") as error:
        decode(raw, "m")
    assert not isinstance(error.value, DamageError)


def test_a_sealed_manifest_without_its_parts_is_refused():
    sealed = encode(Manifest(step=1, layout={}, meta={}, files={"f": {"bytes": "x"}}, tensors={}))
    with pytest.raises(DamageError, match="lacks"):
        decode(sealed, "m")


def held(shape, offset, local, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "offset": offset, "local": local}


def test_what_several_ranks_hold_belongs_to_the_lowest():
    expert = [held((4, 2), (2 * (rank % 2), 0), (2, 2)) for rank in range(4)]
    merged = merge([{"w": held((3,), (0,), (3,)), "e": e} for e in expert])
    assert [s.file for s in merged["w"].slices] == ["rank-00000.safetensors"]
    assert [(s.file, s.offset) for s in merged["e"].slices] == [
        ("rank-00000.safetensors", (0, 0)),
        ("rank-00001.safetensors", (2, 0)),
    ]


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([held((4,), (0,), (2,))], r"w \(2 elements on all ranks\) must have 4"),
        ([held((4,), (0,), (3,)), held((4,), (2,), (2,))], "must not overlap"),
        ([held((4,), (0,), (2,)), held((4,), (3,), (2,))], r"must lie in \(4,\)"),
        ([held((4,), (0,), (4,)), held((4,), (0,), (4,), "F64")], "make them agree"),
        ([held((4,), (0,), (4,)), held((5,), (0,), (5,))], "make them agree"),
        ([held((4,), (0,), (2, 2))], "must lie in"),
    ],
)
def test_blocks_that_do_not_tile_are_refused(reports, message):
    with pytest.raises(CheckpointError, match=message):
        merge([{"w": report} for report in reports])


def test_tiling_is_judged_as_by_counting_elements():
    block = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))

    @settings(max_examples=300, deadline=None)
    @given(st.lists(block, max_size=4))
    def check(blocks):
        slices = tuple(Slice(file="f", offset=b[:2], shape=b[2:]) for b in blocks)
        cells = [c for b in blocks for c in product(range(b[0], b[0] + b[2]), range(b[1], b[1] + b[3]))]
        inside = all(o + n <= 3 for s in slices for o, n in zip(s.offset, s.shape, strict=True))
        good = inside and sorted(cells) == list(product(range(3), range(3)))
        try:
            check_tiling("w", TensorEntry(dtype="F32", shape=(3, 3), slices=slices))
        except CheckpointError:
            assert not good
        else:
            assert good

    check()


def test_overlap_by_hand():
    assert overlap((0, 2), (4, 4), (1, 0), (2, 3)) == (2, 1)
    assert overlap((0,), (2,), (2,), (2,)) == (0,)
    assert overlap((), (), (), ()) == ()
