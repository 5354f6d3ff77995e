"""The tokenizer: lossless, deterministic, the same one in transformers."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout import DataError
from turnout.moe.data.corpus import read_documents
from turnout.moe.data.tokenizer import END, Tokenizer, train_tokenizer

TEXTS = read_documents("pydocs", "validation")[:12]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 1024)


def test_every_text_survives_the_round_trip(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids[0] == tokenizer.eos_id == 0
        assert 0 not in ids[1:]
        assert max(ids) < tokenizer.vocab_size

    check()


def test_a_text_that_spells_the_separator_is_only_text(tokenizer):
    ids = tokenizer.encode(f"a{END}b", add_special_tokens=False)
    assert 0 not in ids
    assert tokenizer.decode(ids) == f"a{END}b"
    assert [list(e) for e in tokenizer.encode_batch([END, ""])] == [[0, *ids[1:-1]], [0]]


def test_training_is_deterministic_in_another_process(tokenizer):
    code = (
        "from turnout.moe.data.tokenizer import train_tokenizer; from turnout.moe.data.corpus import read_documents;"
        "print(train_tokenizer(read_documents('pydocs', 'validation')[:12], 1024).digest)"
    )
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == tokenizer.digest


def test_the_digest_tells_tokenizers_apart(tokenizer):
    assert train_tokenizer(TEXTS, 1025).digest != tokenizer.digest
    assert train_tokenizer(TEXTS[:6], 1024).digest != tokenizer.digest


def test_a_saved_tokenizer_loads_here_and_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).digest == tokenizer.digest
    text = f"def f(x):\n    return x  # é {END}\n"
    plain = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert plain("def f(x):\n").input_ids == tokenizer.encode("def f(x):\n")
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(text).input_ids == tokenizer.encode(text)
    assert auto.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert (auto.eos_token_id, auto.bos_token_id, len(auto)) == (0, 0, tokenizer.vocab_size)


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b'{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_the_separator_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace(END, "<|end|>"))
    with pytest.raises(DataError, match=r"no <\|endoftext\|> token"):
        Tokenizer.load(tmp_path)
