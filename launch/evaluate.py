"""`turnout evaluate`: what a model is worth on text that it has not seen, and what its experts do.

turnout evaluate runs/NAME data=pydocs split=validation baselines=true
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..configs.typed import check
from ..inference.config import Dtype, KVDtype
from ..moe.config import ModelConfig
from ..moe.data.config import SpanConfig
from .cli import Options, parse, write_json
from .rundir import CONFIG, frozen

if TYPE_CHECKING:
    from ..moe import Decoder
    from ..moe.data.tokenizer import Tokenizer
    from ..moe.eval.perplexity import EvalResult

DRAFTED = (2, 4, 8)  # tokens that a draft proposes at once
FOREIGN_LEN = 2048  # tokens of a window where nobody says how long the rows of training were
SUMMARY = "loss, bits per byte and an expert report on held-out text"
HELP = """\
usage: turnout evaluate CKPT [key=value ...]

CKPT is a run, a model directory or a GGUF file. Loss is in nats a token; bits per byte compares across tokenizers.
Of an encoder-decoder the loss is that of the spans that it restores.

  data=pydocs        pydocs, or a .jsonl, .jsonl.xz or .txt file
  split=validation   train, validation, or tuning: what the run's data.tuning kept from training
  baselines=false    also byte-level Markov models (Witten-Bell), trained on the data's training split
  order=5            highest order of those models
  max_bytes=null     read only so much of the split
  seq_len=null       tokens of a window; null = the row length of training (of other people's models at most 2048)
  stride=null        new tokens of each further window; null = no overlap
  dtype=auto         float32, bfloat16, float16 or float64; auto = as stored
  kv_dtype=null      auto or int8: through the serving engine, whose pages hold keys and values as `turnout serve
                     kv_dtype=...` has them; experts are not reported then. null = each window in one forward pass
  device=auto        cpu or cuda; auto = a GPU where there is one
  draft=null         a small model of the same tokenizer: how many of its tokens this one would take
  deterministic=false  as `turnout serve deterministic=true` computes it, bit for bit; slower, on a CPU only
  json=PATH          write the report there

example: turnout evaluate runs/NAME data=pydocs split=validation baselines=true
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """What `turnout evaluate` takes; see HELP."""

    data: str = "pydocs"
    split: Literal["train", "validation", "tuning"] = "validation"
    baselines: bool = False
    order: int = 5
    max_bytes: int | None = None
    seq_len: int | None = None
    stride: int | None = None
    dtype: Dtype = "auto"
    kv_dtype: KVDtype | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    draft: str | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        check(0 <= self.order <= 7, "order", self.order, "must lie in 0 to 7", "use 5")
        fits = self.max_bytes is None or self.max_bytes >= 1
        check(fits, "max_bytes", self.max_bytes, "must be at least 1", "use 200000, or null for all")


def main(args: list[str]) -> int:
    """The verb."""
    (path,), options = parse(EvaluateOptions, args, words=("ckpt",))
    result = report(Path(path), options)
    for line in describe(result):
        print(line, flush=True)
    write_json(options.json, result)
    return 0


def report(path: Path, options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate the model at `path`: loss, perplexity, bits per byte, experts, the loss with them shuffled, baselines.

    Raises:
        CheckpointError: there is no model. DataError: there is no text.
    """
    import torch

    from ..kernels.registry import using
    from ..moe import load_model
    from ..moe.data.corpus import read_documents
    from ..moe.data.tokenizer import Tokenizer
    from ..moe.eval.perplexity import limit_bytes
    from ..moe.eval.shuffle import shuffled_experts
    from ..moe.models.store import tokenizer_directory

    tuning = _tuning(path, options.split)
    documents = limit_bytes(read_documents(options.data, options.split, tuning), options.max_bytes)
    has_gpu = torch.cuda.is_available()
    check(options.device != "cuda" or has_gpu, "device", "cuda", "is not on this machine", "use device=cpu")
    device = options.device if options.device != "auto" else "cuda" if has_gpu else "cpu"
    exact = not options.deterministic or device == "cpu"
    check(exact, "deterministic", True, "has kernels for a CPU only", "use device=cpu")
    model = load_model(path, options.dtype, device)
    with tokenizer_directory(path) as directory:
        tokenizer = Tokenizer.load(directory)
    if options.draft is not None:
        _check_draft(options.draft, tokenizer)
    measure = _measure(path, model, tokenizer, documents, options)
    form = "invariant" if options.deterministic else None
    with using(form):
        result = measure()
    found: dict[str, Any] = {
        "model": str(path),
        "data": options.data,
        "split": options.split,
        **({} if options.kv_dtype is None else {"kv_dtype": options.kv_dtype}),
        "loss": result.val_loss,
        "perplexity": perplexity(result.val_loss),
        **({} if result.bits_per_byte is None else {"bits_per_byte": result.bits_per_byte}),
        "tokens": result.tokens,
        "bytes": result.bytes,
        "seconds": result.seconds,
        "experts": [asdict(layer) for layer in result.experts],
    }
    if model.cfg.moe is not None and options.kv_dtype is None:
        with shuffled_experts(model), using(form):
            found["shuffled_loss"] = measure().val_loss
    if options.draft is not None:
        seq_len = window(path, model.cfg, options)
        found["draft"] = drafted(options.draft, options.dtype, model, tokenizer, documents, seq_len)
    if options.baselines:
        found["markov"] = markov(read_documents(options.data, "train", tuning), documents, options.order)
    return found


def perplexity(nats: float) -> float:
    """e^nats of a loss in nats a token; infinity where no float reaches: e^710 and beyond."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def window(path: Path, cfg: ModelConfig, options: EvaluateOptions) -> int:
    """Tokens of a window; through the engine one less than the longest text, whose last target is in the prompt too."""
    from ..moe.models.store import is_foreign

    if options.seq_len is not None:
        return options.seq_len
    longest = cfg.max_seq_len - (options.kv_dtype is not None)
    if cfg.moe is not None and cfg.moe.capacity_tokens is not None:
        return min(cfg.moe.capacity_tokens, longest)
    return min(longest, FOREIGN_LEN) if is_foreign(path) else longest


def _measure(
    path: Path, model: "Decoder", tokenizer: "Tokenizer", documents: Sequence[str], options: EvaluateOptions
) -> Callable[[], "EvalResult"]:
    """What evaluates the model: by its spans, through the serving engine, or window by window as in training."""
    from ..inference.scored import scored
    from ..inference.text.tokenizer import TextTokenizer
    from ..moe.eval.denoising import denoise
    from ..moe.eval.perplexity import evaluate
    from ..moe.models.store import tokenizer_directory

    seq_len, kv_dtype, own = window(path, model.cfg, options), options.kv_dtype, options.deterministic
    if model.cfg.encoder is not None:
        rule = "scores texts that are predicted whole, and an encoder-decoder is given most of it"
        check(kv_dtype is None, "kv_dtype", kv_dtype, rule, "leave it out")
        return partial(denoise, model, tokenizer, documents, seq_len=seq_len, spans=_spans(path, options))
    windows = partial(evaluate, model, tokenizer, documents)
    if kv_dtype is not None:
        with tokenizer_directory(path) as directory:
            served = TextTokenizer.from_dir(directory)
        windows = partial(scored, model, tokenizer, served, documents, kv_dtype=kv_dtype, deterministic=own)
    return partial(windows, seq_len=seq_len, stride=options.stride)


def _check_draft(path: str, tokenizer: "Tokenizer") -> None:
    """Refuse a draft of other tokens before anything is measured.

    Raises:
        CheckpointError: there is no model. ConfigError: its tokenizer is another.
    """
    from ..moe.data.tokenizer import Tokenizer
    from ..moe.models.store import tokenizer_directory

    with tokenizer_directory(path) as directory:
        same = Tokenizer.load(directory).digest == tokenizer.digest
    check(same, "draft", path, "has another tokenizer", "use a draft that was distilled from this model")


def drafted(
    path: str, dtype: Dtype, model: "Decoder", tokenizer: "Tokenizer", documents: Sequence[str], seq_len: int
) -> dict[str, Any]:
    """What the model at `path` is worth as a draft of `model`, were it to speculate."""
    from ..moe import load_model
    from ..moe.eval.draft import acceptance

    small = load_model(path, dtype, model.device)
    found = acceptance(model, small, tokenizer, documents, seq_len=min(seq_len, small.cfg.max_seq_len))
    expected = {str(count): found.length(count) for count in DRAFTED}
    return {"model": path, "acceptance": found.rate, "greedy": found.greedy, "expected_tokens": expected}


def _tuning(path: Path, split: str) -> float | None:
    """The share of the training documents that the run at `path` left out; None = none, or no run."""
    tuning = frozen(path).data.tuning if (path / CONFIG).is_file() else None
    rule, fix = "is text that data.tuning kept from a run, and here is none", "name such a run, or use split=validation"
    check(split != "tuning" or tuning is not None, "split", f"tuning of {path}", rule, fix)
    return tuning


def _spans(path: Path, options: EvaluateOptions) -> SpanConfig:
    """What an encoder-decoder is measured by: the spans of the run at `path`, T5's where there is no run.

    Raises:
        ConfigError: a setting that only says something of text that is predicted whole.
    """
    rule, fix = "is for models that predict a whole text, and an encoder-decoder is given most of it", "leave it out"
    check(options.stride is None, "stride", options.stride, rule, fix)
    check(not options.baselines, "baselines", True, rule, fix)
    spans = frozen(path).data.spans if (path / CONFIG).is_file() else None
    return spans or SpanConfig()


def markov(train: Sequence[str], held_out: Sequence[str], order: int) -> dict[str, Any]:
    """Bits per byte of the Markov models of order 2 (or the highest below) to `order`, and the seconds it took."""
    from ..moe.eval.markov import markov_bits_per_byte

    started = time.monotonic()
    bits = markov_bits_per_byte(train, held_out, order)
    by_order = {str(k): bits[k] for k in range(min(2, order), order + 1)}
    return {"bits_per_byte": by_order, "seconds": time.monotonic() - started}


def describe(found: dict[str, Any]) -> Iterator[str]:
    """The report as lines for a person."""
    speed = found["tokens"] / max(found["seconds"], 1e-9)
    yield f"{found['data']} {found['split']}: {found['bytes']:,} bytes, {found['tokens']:,} tokens, {speed:,.0f} tok/s"
    yield f"loss            {found['loss']:.4f} nats a token (perplexity {found['perplexity']:.2f})"
    if "kv_dtype" in found:
        yield f"  served        through the engine, keys and values as {found['kv_dtype']}"
    if "shuffled_loss" in found:
        worse = found["shuffled_loss"] / found["loss"] - 1
        yield f"  shuffled      {found['shuffled_loss']:.4f} with every token sent to the wrong expert ({worse:+.1%})"
    if "bits_per_byte" in found:
        yield f"bits per byte   {found['bits_per_byte']:.3f}"
    for order, bits in found.get("markov", {}).get("bits_per_byte", {}).items():
        verdict = "beaten" if found["bits_per_byte"] < bits else "not beaten"
        yield f"  Markov {order}      {bits:.3f} {verdict}"
    if "draft" in found:
        draft = found["draft"]
        lengths = ", ".join(f"{tokens:.2f} with {count}" for count, tokens in draft["expected_tokens"].items())
        yield f"draft           {draft['acceptance']:.1%} of its tokens taken, {draft['greedy']:.1%} greedily"
        yield f"  tokens a pass  {lengths} drafted"
    if "markov" in found:
        yield f"  (computed on the same text in {found['markov']['seconds']:.1f} s)"
    for layer in found["experts"]:
        load = " ".join(f"{share:5.1%}" for share in layer["expert_load"])
        dead = [str(expert) for expert, share in enumerate(layer["expert_load"]) if not share]
        yield (
            f"experts of layer {layer['layer']}: load {load}  max/mean {layer['load_max_mean']:.2f}"
            f"  cv {layer['load_cv']:.2f}  entropy {layer['router_entropy']:.2f}"
            f"  logits {layer['router_logit_norm']:.2f}  dropped {layer['drop_fraction']:.1%}"
            f"{'  dead ' + ', '.join(dead) if dead else ''}"
        )
