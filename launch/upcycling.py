"""A dense checkpoint made sparse and trained on, beside its dense twin: held-out bits per byte before and after.

    python -m turnout.launch.upcycling [run=DIR] [key=value ...]

trains `experiment=upcycle_smollm2` twice on the same rows, with the settings of `turnout train` changed as the words
say, and reads the same part of the held-out text for all four numbers. The twin has `upcycle.num_experts=null`.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import main as cli
from . import train
from .cli import write_json
from .compose import Composed, compose
from .launcher import launch, summary
from .rundir import frozen

HELD_OUT_BYTES = 20_000
TWINS = {"dense": ["upcycle.num_experts=null"], "upcycled": []}


def main(args: list[str]) -> int:
    """Print the comparison; 0, or the exit code of a run that failed."""
    words, result = train.take_json(args)
    places = [word.partition("=")[2] for word in words if word.startswith("run=")]
    root = Path(places[-1] if places else f"runs/upcycling-{time.strftime('%Y%m%d-%H%M%S')}")
    words = [word for word in words if not word.startswith("run=")]
    runs = {name: twin(root, name, [*words, *more]) for name, more in TWINS.items()}
    report = {}
    for name, (composed, all_words) in runs.items():
        run = root / name
        run.mkdir(parents=True, exist_ok=True)
        before = start(composed)
        if code := launch(run, composed, all_words):
            return code
        report[name] = {**before, **after(run)}
    for line in table(report):
        print(line, flush=True)
    write_json(result, report)
    return 0


def twin(root: Path, name: str, words: Sequence[str]) -> tuple[Composed, list[str]]:
    """One of the two runs, composed; both share token stream and held-out text in `root`.

    Raises:
        ConfigError: it can not be.
    """
    held_out = root / "held_out.jsonl"
    ours = [f"data.validation={held_out}", f"data.cache={root}", f"run={root / name}"]
    composed = compose(["experiment=upcycle_smollm2", *words, *ours])
    if not held_out.is_file():
        from ..moe.data.corpus import read_documents
        from ..moe.eval.perplexity import limit_bytes

        texts = limit_bytes(read_documents(composed.config.data.path, "validation"), HELD_OUT_BYTES)
        root.mkdir(parents=True, exist_ok=True)
        held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return composed, ["experiment=upcycle_smollm2", *words, *ours]


def start(composed: Composed) -> dict[str, Any]:
    """Parameters, FLOPs of a training token, and the loss that the run begins with, computed in its own precision."""
    import torch

    from ..moe.data.stream import given_tokenizer, held_out_documents
    from ..moe.eval.perplexity import evaluate
    from ..moe.flops import flops_per_token
    from ..moe.models.decoder import Decoder
    from ..moe.shapes import count, shapes
    from ..moe.train.setup import start_from
    from ..parallel.apply import parallelize
    from ..parallel.mesh import Mesh

    config = composed.config
    with torch.device("meta"):
        model = Decoder(config.model)
    model.to_empty(device="cpu")
    start_from(str(config.train.init), config.upcycle, model, parallelize(model, Mesh.alone(torch.device("cpu"))))
    low = config.train.dtype != "float32"
    with torch.autocast("cpu", getattr(torch, config.train.dtype) if low else torch.bfloat16, enabled=low):
        tokenizer = given_tokenizer(str(config.data.tokenizer))
        found = evaluate(model, tokenizer, held_out_documents(config.data), seq_len=config.train.seq_len, batch=4)
    return {
        "parameters": count(shapes(config.model)),
        "flops_per_token": flops_per_token(config.model, config.train.seq_len),
        "bits_per_byte_before": found.bits_per_byte,
    }


def after(run: Path) -> dict[str, Any]:
    """How the run ended."""
    found, config = summary(run), frozen(run)
    return {
        "bits_per_byte_after": found["bits_per_byte"],
        "steps": found["step"],
        "tokens": found["tokens"],
        "tokens_per_second": found["tokens_per_second"],
        "lr": config.optim.lr,
    }


def table(report: dict[str, dict[str, Any]]) -> list[str]:
    """The report for a person."""
    lines = ["            parameters   GFLOP/token   bits per byte: before    after   steps   tokens   tok/s"]
    for name, row in report.items():
        lines.append(
            f"{name:<10}{row['parameters']:>12,}{row['flops_per_token'] / 1e9:>14.2f}"
            f"{row['bits_per_byte_before']:>24.4f}{row['bits_per_byte_after']:>9.4f}"
            f"{row['steps']:>8,}{row['tokens']:>9,}{row['tokens_per_second']:>8,.0f}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
