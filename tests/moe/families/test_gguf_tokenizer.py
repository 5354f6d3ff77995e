"""A GGUF file's tokenizer as a directory: the ids of transformers, and refusals of what would be a guess."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from turnout import CheckpointError, ConfigError
from turnout.inference.text.tokenizer import TextTokenizer
from turnout.launch.main import main
from turnout.moe.models.store import load_model, tokenizer_directory
from turnout.tests.helpers.gguf_files import llama, metadata_of, tensors_of, write
from turnout.tests.helpers.texts import PARTS, texts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(split, specials: list[str], alphabet: list[str], size: int) -> tuple[list[str], list[str]]:
    """Tokens by id and merges of a BPE over the test's own texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PARTS * 3, trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__), merges


@pytest.fixture(scope="module")
def settings() -> dict:
    return metadata_of(llama().config)


@pytest.fixture(scope="module")
def byte_level(settings) -> dict:
    """A byte-level tokenizer's metadata, without `pre`."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    tokens, merges = trained(split, CONTROLS, sorted(pre_tokenizers.ByteLevel.alphabet()), 500)
    kinds = [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3) + [USER_DEFINED]
    ggml = {
        "model": "gpt2", "tokens": [*tokens, "<think>"], "token_type": kinds, "merges": merges, "bos_token_id": 1,
        "eos_token_id": 2, "padding_token_id": 2, "unknown_token_id": 0, "add_bos_token": False,
    }  # fmt: skip
    return {**settings, **{f"tokenizer.ggml.{key}": value for key, value in ggml.items()}}


@pytest.fixture(scope="module")
def sentencepiece(settings) -> dict:
    """A SentencePiece tokenizer's metadata, as one trains it: merged pieces by rank, then characters."""
    tokens, merges = trained(pre_tokenizers.Metaspace(), [], [], 400)
    merged = list(dict.fromkeys(merge.replace(" ", "") for merge in merges))
    pieces = merged + [token for token in tokens if token not in set(merged)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    ggml = {
        "model": "llama", "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces), "scores": scores,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    return {**settings, **{f"tokenizer.ggml.{key}": value for key, value in ggml.items()}}


def ids(metadata: dict, folder: Path, cases: list[str]) -> list[list[int]]:
    """What our engine makes of `cases`, which must be what transformers reads out of the directory too."""
    with tokenizer_directory(write(folder / "x.gguf", metadata)) as directory:
        ours, theirs = TextTokenizer.from_dir(directory), AutoTokenizer.from_pretrained(directory)
        assert not directory.is_relative_to(folder)
    assert not directory.exists()
    found = [ours.encode(text, parse_special_tokens=True) for text in cases]
    assert found == [theirs(text).input_ids for text in cases]
    assert [ours.decode(row) for row in found] == [theirs.decode(row, skip_special_tokens=True) for row in found]
    return found


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_ids_are_those_of_transformers(byte_level, tmp_path, pre):
    cases = [text for text in texts() if pre != "qwen2" or "e\u0301" not in text]  # which alone normalises texts
    cases += ["<|im_start|>user\nhi<|im_end|>\n", "so <think> of it"]
    found = ids({**byte_level, "tokenizer.ggml.pre": pre}, tmp_path, cases)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert found == [theirs(text).input_ids for text in cases]
    assert len({len(row) for row in found}) > 20


def test_qwen2_composes_characters(byte_level, tmp_path):
    composed, apart = ids({**byte_level, "tokenizer.ggml.pre": "qwen2"}, tmp_path, ["\u00e9", "e\u0301"])
    assert composed == apart


def test_smollm_splits_off_every_digit(byte_level, tmp_path):
    metadata = {**byte_level, "tokenizer.ggml.pre": "smollm"}
    (row,) = ids(metadata, tmp_path, ["a   12"])
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in row] == ["a", "ĠĠĠ", "1", "2"]


def test_llama_3_takes_whole_words_first_and_begins_with_bos(byte_level, tmp_path):
    tokens, kinds = (byte_level[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    word = {"tokenizer.ggml.tokens": [*tokens, "Ġzyzzyva"], "tokenizer.ggml.token_type": [*kinds, NORMAL],
            "tokenizer.ggml.add_bos_token": None}  # fmt: skip
    (whole,) = ids({**byte_level, **word, "tokenizer.ggml.pre": "llama-bpe"}, tmp_path, [" zyzzyva"])
    assert whole == [1, len(tokens)]
    (merged,) = ids({**byte_level, **word, "tokenizer.ggml.pre": "gpt-2"}, tmp_path, [" zyzzyva"])
    assert len(merged) > 2
    assert merged[0] != 1


@pytest.mark.parametrize("ends", [{}, {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}])
def test_sentencepiece_ids_are_those_of_transformers(sentencepiece, tmp_path, ends):
    cases = texts()
    found = ids({**sentencepiece, **ends}, tmp_path, cases)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert found == [theirs(text).input_ids for text in cases]
    assert all((row[0] == 1) == (not ends) for row in found if row)
    assert all(row[-1] == 2 for row in found if ends)


def test_sentencepiece_without_a_leading_space_and_with_forged_tokens(sentencepiece, tmp_path):
    bare = {**sentencepiece, "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    plain, spaced = ids(bare, tmp_path, ["Paris", " Paris"])
    assert plain != spaced
    pieces = [*bare["tokenizer.ggml.tokens"], "</", "s>", "<", "s", "/", ">"]
    pieces = list(dict.fromkeys(pieces))
    more = len(pieces) - len(bare["tokenizer.ggml.tokens"])
    grown = {"tokens": pieces, "token_type": [*bare["tokenizer.ggml.token_type"], *[NORMAL] * more],
             "scores": [*bare["tokenizer.ggml.scores"], *[-900.0] * more]}  # fmt: skip
    file = write(tmp_path / "y.gguf", {**bare, **{f"tokenizer.ggml.{key}": value for key, value in grown.items()}})
    with tokenizer_directory(file) as directory:
        assert 2 not in TextTokenizer.from_dir(directory).encode("</s>")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pre": "poro-chat"}, ConfigError, "tokenizer.ggml.pre (poro-chat)"),
        ({"pre": None}, ConfigError, "tokenizer.ggml.pre (None)"),
        ({"model": "bert"}, ConfigError, "tokenizer.ggml.model (bert)"),
        ({"tokens": None}, CheckpointError, "tokenizer.ggml.tokens is missing"),
        ({"tokens": ["a", "b", "a"]}, CheckpointError, "has a token twice"),
        ({"token_type": [1, 1]}, CheckpointError, "has 2 entries"),
        ({"merges": None}, CheckpointError, "tokenizer.ggml.merges is missing"),
        ({"merges": ["no_such token_here"]}, CheckpointError, "is broken"),
        ({"eos_token_id": 9999}, CheckpointError, "tokenizer.ggml.eos_token_id (9999)"),
        ({"model": "llama"}, CheckpointError, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "remove_extra_whitespaces": True}, ConfigError, "remove_extra_whitespaces"),
    ],
)
def test_a_tokenizer_that_would_be_a_guess_is_refused(byte_level, tmp_path, change, error, message):
    changed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    file = write(tmp_path / "x.gguf", {**byte_level, "tokenizer.ggml.pre": "gpt-2", **changed})
    with pytest.raises(error) as raised, tokenizer_directory(file):
        pass
    assert message in str(raised.value)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("to", ["turnout", "llama"])
def test_convert_makes_a_directory_with_weights_and_tokenizer(byte_level, tmp_path, to):
    ggml = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.chat_template": "{{ messages }}"}
    file = write(tmp_path / "x.gguf", {**byte_level, **ggml}, tensors_of(llama()))
    assert main(["convert", str(file), str(tmp_path / "out"), f"to={to}"]) == 0
    ours, again = load_model(file), load_model(tmp_path / "out")
    assert again.cfg == ours.cfg
    assert all((again.state_dict()[name] == tensor).all() for name, tensor in ours.state_dict().items())
    with tokenizer_directory(file) as directory:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
