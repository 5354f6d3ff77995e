"""A byte-level BPE tokenizer over the training text, through the `tokenizers` library.

Id 0 is `<|endoftext|>`: it begins every document (BOS), separates documents and ends the text (EOS). The words of a
text never produce it, even when they spell it. The saved directory loads in transformers as it is.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ... import DataError

END = "<|endoftext|>"


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; `backend` is the `tokenizers.Tokenizer`."""

    backend: tokenizers.Tokenizer

    def __post_init__(self) -> None:
        if self.backend.token_to_id(END) is None:
            raise DataError(f"tokenizer.json has no {END} token: use a tokenizer that Turnout trained")
        self.backend.encode_special_tokens = True  # text that spells a special token is only text

    @property
    def eos_id(self) -> int:
        """The id of `<|endoftext|>`: separator, BOS and EOS."""
        eos_id = self.backend.token_to_id(END)
        assert eos_id is not None, "checked at birth"
        return eos_id

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        return self.backend.get_vocab_size()

    @property
    def digest(self) -> str:
        """sha256 of the serialised tokenizer, 64 hexadecimal digits."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, begun with BOS (as every document in training is) unless told otherwise."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, BOS included, as int64 arrays; many texts at once are encoded in parallel."""
        return [np.array(e.ids, dtype=np.int64) for e in self.backend.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and transformers' `tokenizer_config.json`."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` from a directory.

        Raises:
            DataError: the file is missing or not a tokenizer of ours.
        """
        file = Path(directory) / "tokenizer.json"
        try:
            text = file.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise DataError(f"{file} can not be read ({error}): give a directory with a tokenizer.json") from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"{file} is not a tokenizer ({error}): give a directory with a tokenizer.json") from error
        return cls(backend)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, 1508.07909; bytes as in GPT-2). The same texts give the same tokenizer.

    A text that is too small yields fewer than `vocab_size` entries.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return Tokenizer(backend)
