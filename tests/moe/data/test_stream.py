"""The cached token stream: separated documents, and a cache that is never silently wrong."""

import json

import numpy as np
import pytest

from turnout import ConfigError, DataError
from turnout.moe.data.config import DataConfig, Source
from turnout.moe.data.stream import held_out_documents, open_stream, prepare, prepare_mix, write_stream
from turnout.moe.data.tokenizer import END, train_tokenizer

TEXTS = ["the cat sat", "on the mat", "é"] * 200


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t, "split": "train"}) + "\n" for t in TEXTS))
    return str(path)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 600])
def test_the_stream_is_the_documents_between_separators(tmp_path, tokenizer, count):
    write_stream(tmp_path / "a.tokens", TEXTS[:count], tokenizer)
    stream = open_stream(tmp_path / "a.tokens", 300)
    expected = [i for text in TEXTS[:count] for i in [0, *tokenizer.encode(text, add_special_tokens=False)]] + [0]
    assert stream.ids.tolist() == expected
    assert len(stream) == len(expected) - 1
    assert stream.ids.dtype == np.uint16
    assert not stream.ids.flags.writeable


def test_a_large_vocabulary_takes_four_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "vocab_size", 70000)
    write_stream(tmp_path / "a.tokens", TEXTS[:2], tokenizer)
    assert open_stream(tmp_path / "a.tokens", 70000).ids.dtype == np.uint32


def test_prepare_builds_once_and_then_reads_the_cache(tmp_path, corpus):
    config = DataConfig(path=corpus, vocab_size=300)
    first, stream = prepare(config, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again, same = prepare(config, tmp_path / "run")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert first.digest == again.digest
    assert np.array_equal(stream.ids, same.ids)


def test_another_corpus_never_meets_the_old_cache(tmp_path, corpus):
    config = DataConfig(path=corpus, vocab_size=300)
    _, old = prepare(config, tmp_path / "run")
    with open(corpus, "a") as out:
        out.write(json.dumps({"text": "more", "split": "train"}) + "\n")
    _, new = prepare(config, tmp_path / "run")
    assert len(new) > len(old)


def test_a_given_tokenizer_is_used_and_must_fit_the_vocabulary(tmp_path, corpus, tokenizer):
    tokenizer.save(tmp_path / "tok")
    used, _ = prepare(DataConfig(path=corpus, vocab_size=300, tokenizer=str(tmp_path / "tok")), tmp_path / "run")
    assert used.digest == tokenizer.digest
    with pytest.raises(ConfigError, match=rf"data\.vocab_size \(257\) must hold .* {tokenizer.vocab_size}"):
        prepare(DataConfig(path=corpus, vocab_size=257, tokenizer=str(tmp_path / "tok")), tmp_path / "run")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-2], "should have"),
        (lambda data: data + b"\0\0", "should have"),
        (lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:], "sha256"),
        (lambda data: b"", "can not be read"),
    ],
)
def test_a_damaged_cache_is_refused_by_name(tmp_path, tokenizer, damage, message):
    file = tmp_path / "a.tokens"
    write_stream(file, TEXTS, tokenizer)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        open_stream(file, 300)
    assert str(file) in str(error.value)
    assert "delete" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_description_is_refused(tmp_path, tokenizer, text):
    write_stream(tmp_path / "a.tokens", TEXTS, tokenizer)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.tokens"):
        open_stream(tmp_path / "a.tokens", 300)


def test_a_token_beyond_the_vocabulary_is_refused_with_its_offset(tmp_path, tokenizer):
    write_stream(tmp_path / "a.tokens", TEXTS, tokenizer)
    ids = open_stream(tmp_path / "a.tokens", 300).ids
    largest = int(ids.max())
    offset = int(np.argmax(ids == largest))
    with pytest.raises(DataError, match=rf"a\.tokens \(offset {offset}\) has token {largest}, vocabulary {largest}"):
        open_stream(tmp_path / "a.tokens", largest)


def test_a_damaged_tokenizer_cache_is_refused(tmp_path, corpus):
    config = DataConfig(path=corpus, vocab_size=300)
    prepare(config, tmp_path / "run")
    (file,) = (tmp_path / "run").glob("tokenizer-*/tokenizer.json")
    file.write_text(file.read_text().replace('"continuing_subword_prefix": null', '"continuing_subword_prefix": ""'))
    with pytest.raises(DataError, match="is corrupt"):
        prepare(config, tmp_path / "run")


def test_validation_comes_from_its_own_file_or_from_the_split(tmp_path, corpus):
    (tmp_path / "held.txt").write_text("held out")
    assert held_out_documents(DataConfig(path=corpus, validation=str(tmp_path / "held.txt"))) == ["held out"]
    with pytest.raises(DataError, match="validation"):
        held_out_documents(DataConfig(path=corpus))
    assert len(held_out_documents(DataConfig())) == 26


def test_a_tuning_share_leaves_stream_and_mixture_and_its_evaluations_read_it(tmp_path, tokenizer):
    path, texts = tmp_path / "many.jsonl", [f"the cat {i} sat" for i in range(200)]
    path.write_text("".join(json.dumps({"text": t, "split": "train"}) + "\n" for t in texts))
    whole = DataConfig(path=str(path), vocab_size=300)
    config = DataConfig(path=str(path), vocab_size=300, tuning=0.1, mix=(Source(path=str(path)),))
    tokenizer, before = prepare(whole, tmp_path / "run")
    same, left = prepare(config, tmp_path / "run")
    (mixed,) = prepare_mix(config, tmp_path / "run", tokenizer)
    kept = [text for text in tokenizer.decode(left.ids, skip_special_tokens=False).split(END) if text]
    assert same.digest == tokenizer.digest
    assert sorted([*kept, *held_out_documents(config, "tuning")]) == sorted(texts)
    assert mixed.sha256 == left.sha256 != before.sha256 == prepare(whole, tmp_path / "run")[1].sha256
