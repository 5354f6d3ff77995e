"""`turnout compress`: a smaller model of a trained one, and what that cost."""

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.typed import check, to_dict
from ..moe.compress.config import CompressConfig
from ..moe.config import ModelConfig
from ..moe.shapes import shapes
from .cli import Options, parse, write_json
from .convert import free_place
from .evaluate import EvaluateOptions, perplexity, window

if TYPE_CHECKING:
    from ..moe.compress.partial import Partial
    from ..moe.compress.walk import Streams
    from ..moe.families.reading import ForeignSource, OwnSource

SUMMARY = "a trained model made smaller: rounded, pruned, with fewer experts"
REPORT, PICTURE = "compress.json", "compress.png"
BATCH, PROMPT, TOKENS, TURNS = 8, 4, 48, 3
DOCUMENTS = 16  # that are read at a time until there are windows enough
HELP = """\
usage: turnout compress CKPT DST method=METHOD [key=value ...]

CKPT is a run, a model directory, a Hugging Face directory or a GGUF file. DST becomes a model directory that every verb
reads; in it lie compress.json and compress.png, which say what it cost. One block is in memory at a time; what was
interrupted goes on where it was (partial-DST, beside DST).

  method=int8        int8, int4, fp8, w8a8, gptq: rounded; magnitude, wanda, sparsegpt: zeros; channels: fewer hidden
                     units; experts, merge: fewer experts; layers: fewer blocks; scan: what zeros cost in each
                     block alone, no model (docs/compress.md)
  bits=null          of gptq: 8 or 4, null = 4; of sparsegpt: rounds what stays in the same pass, null = does not
  scale=null         tensor, channel or group share a scale; null = channel of eight bits, group of four
  group=64           numbers of a group
  zero=false         zero points (asymmetric)
  clip=null          max, percentile (percentile=99.9) or mse; null = mse for gptq, max for the others
  smooth=null        SmoothQuant's strength before rounding; of w8a8 0.5
  embedding=true     round embedding and head too
  sparsity=0.5       share of zeros; pattern=2:4 keeps two of four; scope=global lets the model share them out
  shares=null        a scan.json: shares of zeros by block that cost alike, sparsity of all together
  keep=0.5           share of the hidden units that stay
  num_experts=N      experts that stay: by=load, gate or output says what one is worth
  num_layers=N       blocks that stay, evenly spaced
  damp=0.01          added to second moments, by GPTQ and SparseGPT; act_order=true: GPTQ takes large ones first
  min_rows=32        an expert that met fewer rows is handled by its weights alone
  calibration=pydocs text that the method looks at (training split); samples=32 windows of seq_len=512; seed=0
  data=pydocs        held-out text that the result is measured on, max_bytes=20000 of it
  speed=true         measure tokens a second of one request, before and after
  json=PATH          write the report there too

example: turnout compress runs/x slim method=gptq
         turnout compress runs/x slim method=sparsegpt pattern=2:4
"""


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Options, CompressConfig):
    """What `turnout compress` takes; see HELP."""

    data: str = "pydocs"
    max_bytes: int | None = 20_000
    speed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.max_bytes is None or self.max_bytes >= 1
        check(fits, "max_bytes", self.max_bytes, "must be at least 1", "use 20000, or null for all")

    @property
    def config(self) -> CompressConfig:
        """What decides the model."""
        return CompressConfig(**{each.name: getattr(self, each.name) for each in fields(CompressConfig)})


def main(args: list[str]) -> int:
    """The verb."""
    (source, target), options = parse(CompressOptions, args, words=("ckpt", "dst"))
    if options.method == "scan":
        from .compress_scan import lines, scan_model

        result = scan_model(Path(source), Path(target), options.data, options.max_bytes)
        told = lines(result)
    else:
        result = compress(Path(source), Path(target), options)
        told = describe(result)
    for line in told:
        print(line, flush=True)
    write_json(options.json, result)
    return 0


def compress(path: Path, target: Path, options: CompressOptions) -> dict[str, Any]:
    """Make the model and report.

    Raises:
        ConfigError: a model or settings that do not go together. CheckpointError: files are broken, or weights are
            not finite. NonFiniteError: so is what calibration gives. DataError: there is no text.
    """
    from ..moe.compress.partial import Partial
    from ..moe.compress.walk import walk
    from ..moe.families.reading import open_source

    free_place(path, target)
    started, how = time.monotonic(), options.config
    with open_source(path) as source:
        check(source.cfg.encoder is None, "CKPT", path, "is an encoder-decoder", "give a decoder")
        said = {"how": to_dict(how), "data": options.data, "max_bytes": options.max_bytes}
        files = fingerprint(path, options.data, options.calibration, options.shares)
        partial = Partial(target, {"files": files, "said": said})
        if partial.done:
            print(f"{partial.done} of {source.cfg.layers} blocks are done: going on", flush=True)
        streams = texts(path, source, options)
        losses = walk(source, how, streams, partial, lambda index, notes: print(_line(index, notes), flush=True))
        report = {
            "source": str(path), "target": str(target), "method": options.method, "settings": said,
            **losses_of(losses), "layers": partial.notes, "seconds": time.monotonic() - started,
        }  # fmt: skip
        report |= _write(path, target, source, how, partial)
    if options.speed:
        report |= speeds(path, target, source.cfg.max_seq_len)
    write_json(target / REPORT, report)
    from .compress_plot import draw

    draw(report, target / PICTURE)
    partial.remove()
    return report


def fingerprint(path: Path, *beside: str | None) -> dict[str, Any]:
    """Of the model's files and of those among `beside`: what is made of others is not gone on with."""
    from ..moe.models.store import model_directory

    place = model_directory(path)
    files = [place] if place.is_file() else sorted(place.iterdir())
    files = [file.resolve() for file in (*files, *map(Path, filter(None, beside))) if file.is_file()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def texts(path: Path, source: "OwnSource | ForeignSource", options: CompressOptions) -> "Streams":
    """What calibrates, and what is measured."""
    import numpy as np

    from .. import DataError
    from ..moe.compress.stream import Stream
    from ..moe.compress.walk import Streams
    from ..moe.data.corpus import read_documents
    from ..moe.data.tokenizer import Tokenizer
    from ..moe.eval.perplexity import cut, limit_bytes
    from ..moe.models.store import tokenizer_directory

    with tokenizer_directory(path) as directory:
        tokenizer = Tokenizer.load(directory)

    def windows(documents: list[str], length: int) -> list[Any]:
        ids = [np.append(part, tokenizer.eos_id) for part in tokenizer.encode_batch(documents)]
        return cut(ids, length, length)

    cfg = source.cfg
    documents = limit_bytes(read_documents(options.data, "validation"), options.max_bytes)
    held_out = windows(documents, window(path, cfg, EvaluateOptions()))
    calibration = None
    if options.calibrated:
        documents, length = read_documents(options.calibration, "train"), min(options.seq_len, cfg.max_seq_len)
        order = np.random.default_rng(options.seed).permutation(len(documents))
        found: list[Any] = []
        for some in np.array_split(order, -(-len(order) // DOCUMENTS)):
            if len(found) < options.samples:
                found += windows([documents[i] for i in some], length)
        if not found:
            raise DataError(f"calibration ({options.calibration}) holds no text: give some")
        calibration = Stream(found[: options.samples], BATCH, tokenizer.eos_id, dropless=True)
    before, after = (Stream(held_out, BATCH, tokenizer.eos_id, dropless=False) for _ in range(2))
    return Streams(calibration, before, after)


def _write(
    path: Path, target: Path, source: "OwnSource | ForeignSource", how: CompressConfig, partial: "Partial"
) -> dict[str, Any]:
    """The model directory; sizes before and after."""
    from ..moe.compress.methods import target as target_config
    from ..moe.models.store import TOKENIZER, save_model, tokenizer_directory

    tensors, after = partial.tensors(), target_config(source.cfg, how)
    with tokenizer_directory(path) as beside:
        tokenizer = beside if (beside / TOKENIZER).is_file() else None
        save_model(target, after, tensors, tokenizer)
    was = sum(math.prod(shape) * source.dtype(name, None).itemsize for name, shape in source.shapes().items())
    now, numbers = sum(tensor.nbytes for tensor in tensors.values()), _numbers(after)
    return {
        "parameters_before": _numbers(source.cfg), "parameters_after": numbers,
        "bytes_before": was, "bytes_after": now, "bits_per_weight": 8 * now / numbers, "smaller": was / now,
    }  # fmt: skip


def _numbers(cfg: ModelConfig) -> int:
    """Weights of the model, however they are stored."""
    return sum(math.prod(shape) for shape in shapes(replace(cfg, quantization=None)).values())


def losses_of(losses: Mapping[str, float]) -> dict[str, Any]:
    """Nats a token as perplexities."""
    before, after = (perplexity(losses[name]) for name in ("before", "after"))
    return {
        "loss_before": losses["before"], "loss_after": losses["after"],
        "perplexity_before": before, "perplexity_after": after, "perplexity_increase": after / before - 1,
    }  # fmt: skip


def speeds(path: Path, target: Path, longest: int) -> dict[str, Any]:
    """Tokens a second of one greedy request, the two models in turns; medians.

    Args:
        path, target: the models.
        longest: tokens that they read at most.
    """
    from ..inference.core.sampling import SamplingParams
    from ..inference.llm import LLM

    tokens = min(TOKENS, longest - PROMPT)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    models = {"before": LLM(str(path), max_num_seqs=1), "after": LLM(str(target), max_num_seqs=1)}
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + TURNS):
        for name, llm in models.items():
            started = time.monotonic()
            llm.generate([[*range(PROMPT)]], params)
            if turn:
                found[name].append(tokens / (time.monotonic() - started))
    return {f"tokens_per_second_{name}": statistics.median(each) for name, each in found.items()}


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for a person."""
    yield f"{report['source']} -> {report['target']} ({report['method']}, {report['seconds']:.1f} s)"
    before, after = report["bytes_before"] / 1e6, report["bytes_after"] / 1e6
    yield (
        f"size            {before:,.1f} -> {after:,.1f} MB, {report['smaller']:.2f} x smaller, "
        f"{report['bits_per_weight']:.2f} bits a weight"
    )
    yield (
        f"perplexity      {_readable(report['perplexity_before'])} -> {_readable(report['perplexity_after'])} "
        f"({_readable(100 * report['perplexity_increase'], '+.2f')} %)"
    )
    pruned = [notes for notes in report["layers"] if "zeros" in notes]
    if pruned:
        zeros = sum(notes["zeros"] * notes["weights"] for notes in pruned) / sum(notes["weights"] for notes in pruned)
        yield f"zeros           {zeros:.2%} of the pruned matrices' weights"
    before, after = report["parameters_before"], report["parameters_after"]
    if before != after:
        yield f"parameters      {before:,} -> {after:,} ({after / before:.1%})"
    shares = [notes["agreement"] for notes in report["layers"] if "agreement" in notes]
    if shares:
        worst = min(range(len(shares)), key=shares.__getitem__)
        yield f"same experts    {statistics.fmean(shares):.2%} of choices, least {shares[worst]:.2%}"
    if "tokens_per_second_before" in report:
        slow, fast = report["tokens_per_second_before"], report["tokens_per_second_after"]
        yield f"one request     {slow:,.1f} -> {fast:,.1f} tokens/s ({fast / slow:.2f} x)"
    for index, notes in enumerate(report["layers"]):
        for name, why in notes.get("by_weights", {}).items():
            yield f"by weights      block {index} {name}: {why}"
        if notes.get("unseen"):
            yield f"no rows         block {index}: experts {notes['unseen']}"


def _readable(value: float, form: str = ".3f") -> str:
    """In few digits, however large."""
    return format(value, form if abs(value) < 1e7 else ".3g")


def _line(index: int, notes: Mapping[str, Any]) -> str:
    share = f"  same experts {notes['agreement']:.2%}" if "agreement" in notes else ""
    return f"block {index} done{share}"
