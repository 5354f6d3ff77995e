"""One flat stream of token ids, cached on disk and memory-mapped.

Each document is BOS followed by its tokens, and one EOS closes the stream: as BOS and EOS are the same id, a document's
last token is followed by the separator that it must predict. The cache is a raw little-endian file beside a JSON with
its sha256; its name carries the digests of corpus and tokenizer, so another corpus never meets an old cache.
"""

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ... import ConfigError, DataError
from ...configs.typed import digest
from .config import DataConfig
from .corpus import corpus_digest, read_documents
from .tokenizer import Tokenizer, train_tokenizer

CHUNK = 1 << 24


@dataclass(frozen=True)
class TokenStream:
    """Token ids: `ids[i]` predicts `ids[i + 1]`, so there are `len(ids) - 1` training tokens.

    Attributes:
        ids: one-dimensional, uint16 where the vocabulary fits and uint32 elsewhere; read-only memory.
        eos_id: the separator, which begins every document.
        sha256: of the ids as they lie on disk; empty for a stream that was made in memory.
    """

    ids: np.ndarray
    eos_id: int
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.ids) - 1


def prepare(config: DataConfig, directory: str | Path) -> tuple[Tokenizer, TokenStream]:
    """The tokenizer and the training stream of `config`, taken from the cache or built into it.

    Several ranks may share the cache: let one call `prepare`, then, after a barrier, the others.

    Args:
        directory: the run directory, used unless `data.cache` names another.

    Raises:
        DataError: the corpus or the cache is unreadable, corrupt or empty.
        ConfigError: `data.tokenizer` has more entries than `data.vocab_size`.
    """
    cache = Path(config.cache or directory)
    source = corpus_digest(config.path)
    tokenizer = _open_tokenizer(config, cache, source)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"data.vocab_size ({config.vocab_size}) must hold the tokenizer's {tokenizer.vocab_size} entries: raise it"
        )
    return tokenizer, _stream(config.path, source, cache, tokenizer, config.tuning)


def prepare_mix(config: DataConfig, directory: str | Path, tokenizer: Tokenizer) -> list[TokenStream]:
    """The training streams of the sources of `data.mix`, in order, as `prepare` takes or builds one."""
    cache = Path(config.cache or directory)
    return [_stream(each.path, corpus_digest(each.path), cache, tokenizer, config.tuning) for each in config.mix or ()]


def _stream(path: str, source: str, cache: Path, tokenizer: Tokenizer, tuning: float | None) -> TokenStream:
    key = digest([source, tokenizer.digest, *([] if tuning is None else [tuning])])[:16]
    file = cache / f"train-{key}.tokens"
    if not file.with_suffix(".json").exists():
        write_stream(file, read_documents(path, "train", tuning), tokenizer)
    return open_stream(file, tokenizer.vocab_size)


def held_out_documents(config: DataConfig, split: Literal["validation", "tuning"] = "validation") -> list[str]:
    """Texts that training leaves out: `data.validation` or the `validation` split of `data.path`; or its `tuning`."""
    if split == "tuning":
        return read_documents(config.path, "tuning", config.tuning)
    return read_documents(config.validation) if config.validation else read_documents(config.path, "validation")


def write_stream(file: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    """Encode `texts` into `file` and describe it in the JSON beside it; whole or not at all."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    sha, total = hashlib.sha256(), 0
    with scratch.open("wb") as out:
        for first in range(0, len(texts) + 1, 256):
            parts = tokenizer.encode_batch(texts[first : first + 256])
            if first + 256 > len(texts):
                parts.append(np.array([tokenizer.eos_id]))
            data = np.concatenate(parts).astype(dtype).tobytes()
            out.write(data)
            sha.update(data)
            total += len(data)
        out.flush()
        os.fsync(out.fileno())
    about = {"dtype": dtype.str, "bytes": total, "sha256": sha.hexdigest(), "eos_id": tokenizer.eos_id}
    scratch.replace(file)
    scratch.write_text(json.dumps(about) + "\n", encoding="utf-8")
    scratch.replace(file.with_suffix(".json"))


def open_stream(file: Path, vocab_size: int) -> TokenStream:
    """Memory-map a stream after checking its size, its sha256 and that every id lies below `vocab_size`.

    Raises:
        DataError: naming the file, and both digests or the offset of the first bad token.
    """
    advice = f"delete {file.with_suffix('.*')} to build it again"
    try:
        about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        dtype, size, expected, eos_id = (about[k] for k in ("dtype", "bytes", "sha256", "eos_id"))
        ids = np.memmap(file, dtype=np.dtype(dtype), mode="r")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} can not be read as a token stream ({error}): {advice}") from error
    if ids.nbytes != size:
        raise DataError(f"{file} ({ids.nbytes} bytes) should have {size}: {advice}")
    sha = hashlib.sha256()
    for first in range(0, len(ids), CHUNK):
        sha.update(ids[first : first + CHUNK].data)
    if sha.hexdigest() != expected:
        raise DataError(f"{file} is corrupt (sha256 {sha.hexdigest()}, written {expected}): {advice}")
    for first in range(0, len(ids), CHUNK):
        bad = np.flatnonzero(ids[first : first + CHUNK] >= vocab_size)
        if bad.size:
            place = first + int(bad[0])
            raise DataError(f"{file} (offset {place}) has token {ids[place]}, vocabulary {vocab_size}: {advice}")
    return TokenStream(ids, eos_id, expected)


def given_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a directory, or the one that a GGUF file (also `package:NAME`) carries.

    Raises:
        DataError, CheckpointError: there is none, or it does not read. ConfigError: it is not understood.
    """
    if Path(path).is_dir():
        return Tokenizer.load(path)
    from ..models.store import tokenizer_directory  # loads torch, which training text alone does not need

    with tokenizer_directory(path) as directory:
        return Tokenizer.load(directory)


def _open_tokenizer(config: DataConfig, cache: Path, source: str) -> Tokenizer:
    if config.tokenizer:
        return given_tokenizer(config.tokenizer)
    sentinels = 0 if config.spans is None else config.spans.sentinels
    directory = cache / f"tokenizer-{digest([source, config.vocab_size, *([sentinels] if sentinels else [])])[:16]}"
    if not (directory / "digest").exists():
        trained = train_tokenizer(read_documents(config.path, "train"), config.vocab_size, sentinels)
        trained.save(directory)
        (directory / "digest").write_text(trained.digest + "\n", encoding="ascii")
    tokenizer = Tokenizer.load(directory)
    written = (directory / "digest").read_text(encoding="ascii").strip()
    if tokenizer.digest != written:
        raise DataError(
            f"{directory} is corrupt (sha256 {tokenizer.digest}, written {written}): delete it to train it again"
        )
    return tokenizer
