"""Tokenizers of both families, small and real."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from turnout.inference.text.tokenizer import TextTokenizer

SAMPLE = [
    "The import statement combines two operations; it searches for the named module, then it binds the results.",
    "naïve café, Grüße, 日本語のテキスト, 한국어, emoji 👩‍👩‍👧‍👦 and 👍🏽 and 🏳️‍🌈.",
    "def push(self, token_id: int) -> str:\n    return self._decoder.decode(data)\n",
]
SPECIAL = "<|endoftext|>"


@pytest.fixture(scope="session")
def byte_level() -> TextTokenizer:
    """Byte-level BPE with few merges, so that most characters outside ASCII are spread over several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[SPECIAL], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.add_tokens(["<tool call>"])  # not special, and with a blank that byte-level BPE would not spell so
    return TextTokenizer(tokenizer)


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
