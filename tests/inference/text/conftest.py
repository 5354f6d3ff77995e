"""The other family of tokenizers; the byte-level one is shared by all tests of the engine."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from turnout.inference.text.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def byte_fallback() -> TextTokenizer:
    """A Llama-2-like tokenizer: ▁ for a blank, unknown characters as <0xHH> tokens, a first blank stripped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "▁b", "ab"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return TextTokenizer(tokenizer)
