"""What text a run trains on, and the tokenizer over it."""

from dataclasses import dataclass

from ...configs.typed import check


@dataclass(frozen=True, kw_only=True)
class Source:
    """One text of a mixture.

    Attributes:
        path: as `data.path`; its training documents are read.
        weight: its share of the rows, beside the other sources' weights.
        since, until: the part of the run that it takes part in, as shares of `train.steps`.
    """

    path: str
    weight: float = 1.0
    since: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        check(self.path != "", "data.mix.path", "''", "must not be empty", "name a path")
        check(0 < self.weight < float("inf"), "data.mix.weight", self.weight, "must be positive", "use 1")
        rule = f"must lie in [0, 1) and before until ({self.until})"
        check(0 <= self.since < self.until <= 1, "data.mix.since", self.since, rule, "use since: 0, until: 1")


@dataclass(frozen=True, kw_only=True)
class SpanConfig:
    """Span corruption (T5 1910.10683 §3.1.4): spans of a row are taken out, and the decoder writes them.

    Every row loses the same number of tokens in the same number of spans, so that all have one shape.

    Attributes:
        density: share of a row's tokens that are taken out.
        mean: tokens of a span, in the mean.
        sentinels: ids kept free for the marks that stand for spans, the last of the vocabulary.
    """

    density: float = 0.15
    mean: float = 3.0
    sentinels: int = 100

    def __post_init__(self) -> None:
        check(0 < self.density < 1, "data.spans.density", self.density, "must lie between 0 and 1", "use 0.15")
        fits = 1 <= self.mean < float("inf")
        check(fits, "data.spans.mean", self.mean, "must be at least 1", "use 3")
        check(self.sentinels >= 1, "data.spans.sentinels", self.sentinels, "must be at least 1", "use 100")

    def noise(self, row: int) -> int:
        """Tokens that a row of so many loses."""
        return min(max(round(row * self.density), 1), row - 1)

    def count(self, row: int) -> int:
        """Spans in which it loses them: each has a token, and a token before it."""
        noise = self.noise(row)
        return min(max(round(noise / self.mean), 1), row - noise)

    def source(self, row: int) -> int:
        """Tokens that the encoder reads: what is left, a mark a span, and the end."""
        return row - self.noise(row) + self.count(row) + 1

    def target(self, row: int) -> int:
        """Tokens that the decoder writes: what is taken out, a mark a span, and the end."""
        return self.noise(row) + self.count(row) + 1

    def check_row(self, row: int) -> None:
        """Check that there are marks enough for a row of so many tokens.

        Raises:
            ConfigError: data.spans.sentinels is named.
        """
        need, rule = self.count(row), f"must be at least the {self.count(row)} spans of a row (train.seq_len={row})"
        check(self.sentinels >= need, "data.spans.sentinels", self.sentinels, rule, f"use {need}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus and tokenizer.

    Attributes:
        path: `pydocs` (shipped: the documentation of Python 3.11) or a .jsonl, .jsonl.xz or .txt file.
        validation: a file of held-out text; None takes the documents of `path` whose split is `validation`.
        vocab_size: entries of the byte-level BPE tokenizer, which is trained on the training documents.
        tokenizer: a directory with a `tokenizer.json`, or a GGUF file, to use instead of training one.
        cache: where tokenizer and token stream are kept; None is the run directory.
        tuning: share of the training documents that a run leaves out, so that settings are chosen by them and not by
            the held-out text; None = none of them.
        mix: what a run trains on in place of `path` alone, row by row in the proportion of the weights; tokenizer and
            held-out text stay those of `path`. None = `path`.
        spans: what an encoder-decoder learns from; None = the next token, a decoder's.
    """

    path: str = "pydocs"
    validation: str | None = None
    vocab_size: int = 6144
    tokenizer: str | None = None
    cache: str | None = None
    tuning: float | None = None
    mix: tuple[Source, ...] | None = None
    spans: SpanConfig | None = None

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
        if self.spans is not None:
            least = 257 + self.spans.sentinels
            rule = f"must hold 256 bytes, <|endoftext|> and the {self.spans.sentinels} of data.spans.sentinels"
            check(self.vocab_size >= least, "data.vocab_size", self.vocab_size, rule, f"use {least} or more")
            rule = "is not built for data.mix, whose rows are a decoder's"
            check(self.mix is None, "data.spans", "set", rule, "use data.mix=null")
        rule = "must lie between 0 and 1"
        check(self.tuning is None or 0 < self.tuning < 1, "data.tuning", self.tuning, rule, "use 0.05, or null")
        check(self.mix is None or len(self.mix) > 0, "data.mix", "[]", "must name a source", "use null for data.path")
        for share in sorted({0.0, *(source.until for source in self.mix or ())} - {1.0}):
            active = [source for source in self.mix or () if source.since <= share < source.until]
            rule = f"leaves no source after {share:g} of the run"
            check(not self.mix or bool(active), "data.mix", f"{len(self.mix or ())} sources", rule, "raise an until")
