"""Loss on held-out documents through the serving engine: chunks of prompts, pages of keys and values, its kernels.

Each window of the evaluation (`moe/eval/perplexity.py`) is a prompt that asks for its tokens' log-probabilities and
generates nothing, so what pages of int8 cost is measured where they are used.
"""

import math
import time
from collections.abc import Sequence

import numpy as np

from .. import DataError
from ..configs.typed import check
from ..moe.data.tokenizer import Tokenizer
from ..moe.eval.perplexity import EvalResult, Window, cut
from ..moe.models.decoder import Decoder
from .config import EngineConfig, KVDtype
from .core.sampling import SamplingParams
from .engine import Engine
from .outputs import FailedOutput, RequestOutput
from .text.tokenizer import TextTokenizer

SEQUENCES = 4  # at once
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)


def scored(
    model: Decoder,
    tokenizer: Tokenizer,
    served: TextTokenizer,
    documents: Sequence[str],
    *,
    seq_len: int,
    stride: int | None = None,
    kv_dtype: KVDtype = "auto",
    deterministic: bool = False,
) -> EvalResult:
    """The loss of `evaluate`, as the engine computes it; experts drop what they drop there, and are not reported.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's, which cuts the documents; `served` is the same for the engine.
        seq_len: tokens of a window, fewer than the model's longest: a window and the token behind it are one prompt.
        stride: new tokens of each further window; None = `seq_len`, no overlap.
        kv_dtype, deterministic: as `EngineConfig` has them.

    Raises:
        ConfigError: a length that does not fit, or a model that can not be served so. DataError: there is no text.
        NonFiniteError: logits that are not finite.
    """
    start, longest = time.monotonic(), model.cfg.max_seq_len
    rule = f"must lie in 1 to {longest - 1} through the engine, where a window's last target is in the prompt too"
    check(1 <= seq_len < longest, "seq_len", seq_len, rule, "lower it")
    size_bytes = sum(len(text.encode()) for text in documents)
    if not size_bytes:
        raise DataError("the documents hold no text: give some")
    ids = [np.append(part, tokenizer.eos_id) for part in tokenizer.encode_batch(documents)]
    windows = cut(ids, seq_len, seq_len if stride is None else stride)
    drops = model.cfg.moe is not None and model.cfg.moe.eval_capacity_factor is not None
    config = EngineConfig(
        max_num_seqs=SEQUENCES, max_model_len=seq_len + 1, max_waiting=len(windows), enable_prefix_caching=False,
        kv_dtype=kv_dtype, deterministic=deterministic, moe_capacity="trained" if drops else "dropless",
    )  # fmt: skip
    engine = Engine(model, served, config)
    try:
        total = _nats(engine, windows)
    finally:
        engine.close()
    tokens = sum(len(part) - 1 for part in ids)
    bits = total / math.log(2) / size_bytes
    seconds = time.monotonic() - start
    return EvalResult(
        val_loss=total / tokens, bits_per_byte=bits, tokens=tokens, bytes=size_bytes, seconds=seconds, experts=()
    )


def _nats(engine: Engine, windows: Sequence[Window]) -> float:
    """Σ −log p of every window's scored tokens."""
    for number, window in enumerate(windows):
        engine.add_request(str(number), window.ids.tolist(), SCORE)
    total = 0.0
    while engine.has_unfinished:
        finished = [output for output in engine.step() if output.finished]
        total += sum(_nats_of(output, windows[int(output.request_id)]) for output in finished)
    return total


def _nats_of(output: RequestOutput, window: Window) -> float:
    if isinstance(output, FailedOutput) and output.error is not None:
        raise output.error
    first, found = window.scored + 1, output.prompt_logprobs
    assert found is not None, "they were asked for"
    scores = zip(window.ids[first:].tolist(), found[first:], strict=True)
    return -sum(row[token] for token, row in scores if row is not None)
