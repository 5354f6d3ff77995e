"""What text a run trains on, and the tokenizer over it."""

from dataclasses import dataclass

from ...configs.typed import check


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus and tokenizer.

    Attributes:
        path: `pydocs` (shipped: the documentation of Python 3.11) or a .jsonl, .jsonl.xz or .txt file.
        validation: a file of held-out text; None takes the documents of `path` whose split is `validation`.
        vocab_size: entries of the byte-level BPE tokenizer, which is trained on the training documents.
        tokenizer: a directory with a `tokenizer.json` to use instead of training one.
        cache: where tokenizer and token stream are kept; None is the run directory.
    """

    path: str = "pydocs"
    validation: str | None = None
    vocab_size: int = 6144
    tokenizer: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for field in ("path", "validation", "tokenizer", "cache"):
            check(getattr(self, field) != "", f"data.{field}", "''", "must not be empty", "name a path")
        check(
            257 <= self.vocab_size <= 2**20,
            "data.vocab_size",
            self.vocab_size,
            "must lie in 257 (256 bytes and <|endoftext|>) to 1048576",
            "use 4096 to 8192 for a small corpus",
        )
