"""What zeros cost in each block alone: `turnout compress CKPT DST method=scan`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..configs.typed import check
from .cli import write_json
from .convert import free_place
from .evaluate import EvaluateOptions, perplexity, window
from .sensitivity_plot import draw

SHARES = (0.25, 0.5, 0.75)
SCAN, PICTURE = "scan.json", "scan.png"


def scan_model(path: Path, target: Path, data: str, max_bytes: int | None) -> dict[str, Any]:
    """Perplexity with zeros in one block after the other, by magnitude; the whole model is in memory.

    Args:
        path: the model.
        target: where scan and picture go.
        data, max_bytes: held-out text, and how much of it.

    Raises:
        ConfigError, CheckpointError: no such model, one that is rounded, or a DST that is something else.
        DataError: there is no text.
    """
    from ..moe import load_model
    from ..moe.compress.sensitivity import scan
    from ..moe.compress.watch import places
    from ..moe.data.corpus import read_documents
    from ..moe.data.tokenizer import Tokenizer
    from ..moe.eval.perplexity import evaluate, limit_bytes
    from ..moe.families.reading import check_whole
    from ..moe.models.store import tokenizer_directory

    free_place(path, target)
    model = load_model(path, "float32")
    check(model.cfg.encoder is None, "CKPT", path, "is an encoder-decoder", "give a decoder")
    check_whole(model.cfg, path)
    with tokenizer_directory(path) as directory:
        tokenizer = Tokenizer.load(directory)
    documents = limit_bytes(read_documents(data, "validation"), max_bytes)
    length = window(path, model.cfg, EvaluateOptions())

    def measure() -> float:
        return perplexity(evaluate(model, tokenizer, documents, seq_len=length).val_loss)

    layers = {str(i): {name: w_FD for name, w_FD, *_ in places(block)} for i, block in enumerate(model.blocks)}
    scanned = scan(layers, SHARES, measure)
    found = {"source": str(path), **asdict(scanned)}
    write_json(target / SCAN, found)
    draw(scanned, target / PICTURE)
    return found


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The scan for a person."""
    yield f"{found['source']}: perplexity {found['dense']:.3f}; by so much it grows with zeros in one block alone"
    yield "block     " + "".join(f"{share:>12.0%}" for share in found["shares"])
    for layer, increases in found["increases"].items():
        yield f"{layer:<10}" + "".join(f"{increase:>+12.3f}" for increase in increases)
