"""`tokenizer.json` as the engine uses it: text to ids, and every id to the BYTES it stands for.

Bytes, not text, are what a token is: one character may be spread over several tokens. Two families of tokenizers are
understood: byte-level BPE (GPT-2, Llama 3, Qwen, our own) and SentencePiece-like ones (Llama 2, Mistral, T5).
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from ... import ConfigError, DataError, RequestError

SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class TextTokenizer:
    """One model's tokenizer. Threads may share it: it holds nothing but a cache.

    Attributes:
        adds_blank: it puts a blank before a text, which decoding the whole takes away again (SentencePiece).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._literal = copy.deepcopy(tokenizer)
        self._literal.encode_special_tokens = True  # the library's name for: do not parse them
        self._added = tokenizer.get_added_tokens_decoder()
        self._byte_level = _is_byte_level(tokenizer)
        self.adds_blank = not self._byte_level and tokenizer.decoder.decode(["▁a"]) == "a"
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = tokenizer.get_vocab_size()

    @classmethod
    def from_dir(cls, path: str | Path) -> "TextTokenizer":
        """Read `path/tokenizer.json`.

        Raises:
            DataError: the file is missing or is not a tokenizer.
        """
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"{file} is missing: copy the model's tokenizer.json there")
        try:
            text = file.read_text(encoding="utf-8")
            json.loads(text)
        except ValueError as error:
            raise DataError(f"{file} is not JSON ({error}): copy the model's tokenizer.json again") from error
        return cls(tokenizers.Tokenizer.from_str(text))

    def encode(self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = False) -> list[int]:
        """The ids of `text`.

        Args:
            text: what to encode.
            add_special_tokens: let the tokenizer add what its model expects around a text (such as BOS).
            parse_special_tokens: spelled control tokens become control tokens, as a chat template wants it; otherwise
                they are only text, so that no prompt can forge one.

        Raises:
            RequestError: the text holds a lone surrogate, which no UTF-8 can carry.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError("prompt holds a lone surrogate: send valid Unicode", "prompt") from error
        tokenizer = self._tokenizer if parse_special_tokens else self._literal
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of whole `ids` (for a stream use `Detokenizer`)."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token such as `<|endoftext|>`."""
        return token_id in self._added and self._added[token_id].special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token in running text; empty for an id that the tokenizer does not know."""
        if token_id not in self._bytes:
            token = self._tokenizer.id_to_token(token_id) or ""
            self._bytes[token_id] = _byte_level(token) if self._byte_level else _sentencepiece(token)
        return self._bytes[token_id]


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    state = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {"type": "none"}
    kinds = {part["type"] for part in state.get("decoders", [state])}
    if "ByteLevel" in kinds:
        return True
    if kinds <= SENTENCEPIECE:
        return False
    rule = "is not understood"
    raise ConfigError(f"tokenizer decoder ({', '.join(sorted(kinds))}) {rule}: use byte-level BPE or byte fallback")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: printable Latin-1 as itself, the others shifted to 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    if all(char in ALPHABET for char in token):
        return bytes(ALPHABET[char] for char in token)
    return token.encode()  # an added token is spelled as it is


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()
