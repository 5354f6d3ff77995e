"""A byte-level BPE tokenizer over the training text, or one that came with a checkpoint, through `tokenizers`.

One token begins every document (BOS), separates documents and ends the text (EOS): `<|endoftext|>`, id 0 of those that
are trained here; of others the token that they begin a text with, else `<|endoftext|>`, else their EOS. The words of a
text never produce it, even when they spell it. The saved directory loads in transformers as it is.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ... import DataError

END = "<|endoftext|>"
SENTINEL = "<extra_id_{}>"  # T5's name


OWN_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        config: transformers' `tokenizer_config.json`, a chat template that lay beside it included.
    """

    backend: tokenizers.Tokenizer
    config: Mapping[str, Any] = field(default_factory=lambda: OWN_CONFIG)

    def __post_init__(self) -> None:
        if self._separator() is None:
            raise DataError(
                f"tokenizer.json has no {END} token, and tokenizer_config.json names no other eos_token: "
                "use a tokenizer that Turnout trained, or one with an eos_token"
            )
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # text that spells a special token is only text

    def _separator(self) -> int | None:
        begun = self.backend.encode("").ids
        if begun and begun[0] == self._id("bos_token"):
            return begun[0]
        end = self.backend.token_to_id(END)
        return self._id("eos_token") if end is None else end

    def _id(self, name: str) -> int | None:
        token = self.config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        return None if text is None else self.backend.token_to_id(text)

    @cached_property
    def eos_id(self) -> int:
        """The id that begins, separates and ends documents."""
        eos_id = self._separator()
        assert eos_id is not None, "checked at birth"
        return eos_id

    def sentinel_id(self, number: int) -> int:
        """The id of a span's mark, numbered from 0; they count down from the vocabulary's last id, as T5's do.

        Raises:
            DataError: the tokenizer has none.
        """
        found = self.backend.token_to_id(SENTINEL.format(number))
        if found is None:
            raise DataError(f"tokenizer.json has no {SENTINEL.format(number)}: use one trained with data.spans")
        return found

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
        begin = [self.eos_id] if add_special_tokens else []
        return begin + self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, BOS included, as int64 arrays; many texts at once are encoded in parallel."""
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([self.eos_id, *e.ids], dtype=np.int64) for e in found]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and transformers' `tokenizer_config.json`."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        (path / "tokenizer_config.json").write_text(json.dumps(dict(self.config), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` from a directory, and what lies beside it: `tokenizer_config.json`, a chat template.

        Raises:
            DataError: the file is missing or not a tokenizer, or no token of it ends a text.
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
        return cls(backend, _config(file.parent))


def _config(directory: Path) -> Mapping[str, Any]:
    """`tokenizer_config.json` with the template of `chat_template.jinja`; ours without either."""
    file, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else dict(OWN_CONFIG)
        if template.is_file():
            found["chat_template"] = template.read_text(encoding="utf-8")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} does not read as JSON ({error}): copy the tokenizer again") from error
    return found


def train_tokenizer(texts: Iterable[str], vocab_size: int, sentinels: int = 0) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, 1508.07909; bytes as in GPT-2). The same texts give the same tokenizer.

    A text that is too small yields fewer than `vocab_size` entries. The last `sentinels` of them mark spans.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - sentinels,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([SENTINEL.format(number) for number in reversed(range(sentinels))])
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return Tokenizer(backend)
