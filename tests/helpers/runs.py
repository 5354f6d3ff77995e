"""Small runs on real text: a corpus of a few hundred kilobytes, a model that trains in a second, and what a run left.

words = tiny(corpus(directory), "train.steps=6")
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from turnout.moe.data.corpus import read_documents

TIMEOUT = 240


@functools.cache
def _texts() -> tuple[list[str], list[str]]:
    return read_documents("pydocs", "train")[:40], read_documents("pydocs", "validation")[:2]


def corpus(directory: Path) -> Path:
    """A .jsonl with some of Python's documentation, both splits, in `directory`."""
    path = directory / "corpus.jsonl"
    if not path.exists():
        train, held_out = _texts()
        rows = [{"text": t[:8000], "split": "train"} for t in train] + [
            {"text": t[:2000], "split": "validation"} for t in held_out
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny(data: Path, *words: str) -> list[str]:
    """The words of a run of seconds on `data`, whose tokenizer is kept beside it; `words` come last."""
    return [
        "model=tiny",
        f"data.path={data}",
        f"data.cache={data.parent}",
        "data.vocab_size=400",
        "train.seq_len=32",
        "train.global_batch=4",
        "train.steps=6",
        "train.save_every=2",
        "log.every=1",
        "nproc=1",
        *words,
    ]


def start(*command: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start a program of ours (`-m turnout ...`) with its output captured, both streams in one."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **(env or {})}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **options,
    )


def run(*command: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`start`, to the end."""
    with start(*command, env=env, **options) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def rows(directory: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` of one kind."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def fingerprint(directory: Path, step: int) -> dict[str, str]:
    """sha256 of every global tensor in a run's checkpoint of `step`: equal means equal bits, optimizer included."""
    import torch

    from turnout.parallel.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(directory / "checkpoints" / f"step-{step:08d}")
    return {
        name: hashlib.sha256(checkpoint.read_all(name).reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name in checkpoint.names()
    }
