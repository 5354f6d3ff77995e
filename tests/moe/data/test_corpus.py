"""Documents from files: what is read, and how every kind of damage is refused."""

import hashlib
import json
import lzma

import pytest

from turnout import DataError
from turnout.moe.data.corpus import PYDOCS, corpus_digest, read_documents


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def test_the_shipped_corpus_has_its_published_size_and_split_rule():
    train, validation = read_documents("pydocs", "train"), read_documents("pydocs", "validation")
    assert (len(train) + len(validation), sum(map(len, train)), sum(map(len, validation))) == (495, 10140178, 857969)
    for line in lzma.decompress(PYDOCS.read_bytes()).decode().splitlines():
        record = json.loads(line)
        held_out = int(hashlib.sha256(record["path"].encode()).hexdigest(), 16) % 20 == 0
        assert record["split"] == ("validation" if held_out else "train")


def test_named_splits_are_kept_apart_in_file_order(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": t, "split": s} for t, s in [("x", "train"), ("y", "validation")] * 2))
    assert read_documents(path, "train") == ["x", "x"]
    assert read_documents(path) == ["x", "y", "x", "y"]


def test_unnamed_splits_follow_the_text_not_the_order(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    forward = write(tmp_path / "a.jsonl", *({"text": t} for t in texts))
    backward = write(tmp_path / "b.jsonl", *({"text": t} for t in reversed(texts)))
    held_out = read_documents(forward, "validation")
    assert 5 <= len(held_out) <= 40
    assert held_out == read_documents(backward, "validation")[::-1]
    assert sorted(held_out + read_documents(forward, "train")) == sorted(texts)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo é\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "a.txt"), "train") == ["one\n\ntwo é\n"]


@pytest.mark.parametrize(
    ("name", "data", "place"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "byte 24"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', "line 2"),
        ("a.jsonl", b'{"text": 3}\n', "line 1"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.jsonl", b'{"text": "ab\\ud800"}\n', "line 1, character 2"),
        ("a.jsonl", b'{"text": "x", "split": 3}\n', "line 1"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.txt", b"abc\xff", "byte 3"),
        ("a.txt", b"", "holds no text"),
        ("a.csv", b"x", "must end in"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 9)[:-20], "after line"),
        ("a.jsonl.xz", b"no archive", "after line 0"),
    ],
)
def test_damage_is_refused_with_file_and_place(tmp_path, name, data, place):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=place) as error:
        read_documents(str(tmp_path / name))
    assert name in str(error.value)


def test_a_missing_file_and_a_missing_split_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_documents(str(tmp_path / "none.jsonl"))
    path = write(tmp_path / "a.jsonl", {"text": "x", "split": "train"})
    with pytest.raises(DataError, match=r"set data\.validation"):
        read_documents(path, "validation")


def test_the_digest_is_of_the_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert corpus_digest(str(tmp_path / "a.txt")) == hashlib.sha256(b"abc").hexdigest()


def test_a_tuning_share_is_taken_from_the_training_documents_by_their_text(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    forward = write(tmp_path / "a.jsonl", *({"text": t} for t in texts))
    backward = write(tmp_path / "b.jsonl", *({"text": t} for t in reversed([*texts, *texts])))
    all_of_them, held_out = read_documents(forward, "train"), read_documents(forward, "validation")
    some, more = (read_documents(forward, "tuning", share) for share in (0.05, 0.2))
    assert 8 <= len(some) <= 40
    assert 40 <= len(more) <= 120
    assert set(some) < set(more)
    assert sorted(more + read_documents(forward, "train", 0.2)) == sorted(all_of_them)
    assert set(read_documents(backward, "tuning", 0.2)) == set(more)
    assert read_documents(forward, "validation", 0.2) == held_out


def test_an_empty_side_of_the_tuning_share_is_refused(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("all of it")
    for split, share in (("tuning", 1e-9), ("train", 1 - 1e-9)):
        with pytest.raises(DataError, match=rf"one\.txt \(split {split}\) holds no text when data\.tuning"):
            read_documents(str(path), split, share)
    with pytest.raises(DataError, match=r"split tuning\) holds no text"):
        read_documents(str(path), "tuning")
