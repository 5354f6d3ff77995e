"""Tokens to text, one token at a time, for one running choice.

The bytes of each token go through an incremental UTF-8 decoder: an incomplete character is held back until its last
byte comes, never shown as U+FFFD, and each token costs its own bytes only. All pieces joined are exactly the decoding
of the whole; bytes that never become a character show as U+FFFD once that is certain, as in any UTF-8 decoder.
"""

import codecs
from collections.abc import Sequence

from .tokenizer import TextTokenizer

LONGEST_CHARACTER = 4  # bytes


class Detokenizer:
    """The text of one choice as it grows.

    Args:
        tokenizer: the model's.
        prompt_ids: what stands before. A character that its last bytes begin may be completed by the first output
            tokens; if it is not, it was the prompt's affair and leaves no trace in the output.
        skip_special_tokens: leave control tokens out of the text.
        opens: the tokens begin a text, as an encoder-decoder's do: a blank that the tokenizer adds there is dropped.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool = True,
        opens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._opens = opens and tokenizer.adds_blank
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(b"".join(self._bytes(token_id) for token_id in prompt_ids[-LONGEST_CHARACTER:]))
        self._begun = self._decoder.getstate()[0]  # by the prompt, until the first output byte

    def push(self, token_id: int) -> str:
        """The characters that this token completes, possibly none."""
        data = self._bytes(token_id)
        if data and self._opens:
            self._opens, data = False, data.removeprefix(b" ")
        if data and self._begun:
            if not _continues(self._begun, data[:1]):
                self._decoder.reset()
            self._begun = b""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is still held back when the choice ends: nothing, or one U+FFFD for bytes that will never be whole."""
        return "" if self._begun else self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        skipped = self._skip and self._tokenizer.is_special(token_id)
        return b"" if skipped else self._tokenizer.token_bytes(token_id)


def _continues(begun: bytes, byte: bytes) -> bool:
    """Whether `byte` may follow the `begun` bytes of a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begun + byte)
    except UnicodeDecodeError:
        return False
    return True
