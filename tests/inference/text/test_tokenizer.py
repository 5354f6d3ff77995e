"""Reading `tokenizer.json`, and the bytes of every token."""

import pytest
import tokenizers
from tokenizers import decoders, models

from turnout import ConfigError, DataError, RequestError
from turnout.inference.text.tokenizer import TextTokenizer


def test_a_directory_round_trip_keeps_ids_and_text(byte_level, tmp_path):
    byte_level._tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = TextTokenizer.from_dir(tmp_path)
    ids = again.encode("naïve 👍🏽 text")
    assert ids == byte_level.encode("naïve 👍🏽 text")
    assert again.decode(ids) == "naïve 👍🏽 text"


def test_the_bytes_of_all_tokens_are_those_of_the_text(byte_level):
    text = "Grüße, 日本語 <tool call> 👩‍👩‍👧‍👦\n"
    assert b"".join(byte_level.token_bytes(i) for i in byte_level.encode(text)) == text.encode()


def test_only_control_tokens_are_special(byte_level):
    assert byte_level.is_special(0)
    assert not any(byte_level.is_special(i) for i in byte_level.encode("<tool call> x"))


def test_a_text_can_not_forge_a_control_token(byte_level):
    ids = byte_level.encode("a<|endoftext|>b")
    assert not any(byte_level.is_special(i) for i in ids)
    assert byte_level.decode(ids) == "a<|endoftext|>b"
    assert 0 in byte_level.encode("a<|endoftext|>b", parse_special_tokens=True)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        TextTokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        TextTokenizer.from_dir(tmp_path)


def test_a_lone_surrogate_is_a_bad_request(byte_level):
    with pytest.raises(RequestError, match="surrogate"):
        byte_level.encode("a\ud800b")


def test_a_decoder_that_is_not_understood_is_refused():
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0}))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="WordPiece"):
        TextTokenizer(tokenizer)
