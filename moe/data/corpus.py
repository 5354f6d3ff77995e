"""Documents from files: the shipped pydocs corpus, or any .jsonl, .jsonl.xz or .txt.

A JSON line is an object with `text` and, optionally, `split`. A document without one belongs to `validation` when
sha256(text) % 20 == 0 and to `train` otherwise, so a split never depends on the order of the lines. Of the documents of
`train` those with sha256(text) < tuning · 2^256 are the split `tuning`: equal texts go together, in whatever file, and
a smaller share is part of a larger one. A .txt file is one training document. Whatever can not be read is an error that
names the file and the place; nothing is skipped.
"""

import hashlib
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from ... import DataError

PYDOCS = Path(__file__).parent / "pydocs" / "pydocs.jsonl.xz"


def corpus_file(path: str) -> Path:
    """The file behind `data.path`.

    Raises:
        DataError: there is no such file, or its kind is unknown.
    """
    file = PYDOCS if path == "pydocs" else Path(path)
    if not file.name.endswith((".jsonl", ".jsonl.xz", ".txt")):
        raise DataError(f"data.path ({path}) must end in .jsonl, .jsonl.xz or .txt: convert it, or use pydocs")
    if not file.is_file():
        raise DataError(f"data.path ({path}) is not a file: correct the path, or use pydocs")
    return file


def read_documents(path: str, split: str | None = None, tuning: float | None = None) -> list[str]:
    """The texts of one split (`train`, `tuning`, `validation`), or of every split when None, in file order.

    Args:
        tuning: share of the training documents that are the split `tuning`; None = none.

    Raises:
        DataError: the file is missing, malformed (file and line named) or holds no text for the split.
    """
    file = corpus_file(path)
    of_all = "train" if split == "tuning" else split
    texts = [text for text, belongs in _records(file) if of_all in (None, belongs)]
    if of_all == "train" and tuning is not None:
        texts = [text for text in texts if _is_tuning(text, tuning) == (split == "tuning")]
        if not any(texts):
            fix = "change the share, or give more documents"
            raise DataError(f"{file} (split {split}) holds no text when data.tuning ({tuning:g}) divides it: {fix}")
    if not any(texts) or (split == "tuning" and tuning is None):
        raise DataError(
            f"{file} (split {split or 'any'}) holds no text: give documents of that split, or set data.validation"
        )
    return texts


def corpus_digest(path: str) -> str:
    """sha256 of the file's bytes, 64 hexadecimal digits."""
    with corpus_file(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_tuning(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()) < share * 2**256


def _records(file: Path) -> Iterator[tuple[str, str]]:
    if file.suffix == ".txt":
        yield _decode(file.read_bytes(), file, 0), "train"
        return
    offset = 0
    for number, line in _lines(file):
        if line.strip():
            yield _parse(_decode(line, file, offset), file, number)
        offset += len(line)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with lzma.open(file, "rb") if file.suffix == ".xz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{file} (after line {number}) is corrupt or truncated ({error}): copy it again") from error


def _decode(data: bytes, file: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} (byte {offset + error.start}) is not UTF-8: convert the text") from error


def _parse(line: str, file: Path, number: int) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file} (line {number}) is not JSON ({error}): write one object a line") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{file} (line {number}) must be an object with a string "text": correct the line')
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{file} (line {number}, character {error.start}) is half of a surrogate pair: correct the escape"
        ) from error
    split = record.get("split")
    if split is None:
        held_out = int.from_bytes(hashlib.sha256(data).digest()) % 20 == 0
        split = "validation" if held_out else "train"
    if not isinstance(split, str):
        raise DataError(f'{file} (line {number}) has a "split" that is not a string: use "train" or "validation"')
    return text, split
