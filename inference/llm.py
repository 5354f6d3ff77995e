"""Offline generation, as users of vLLM know it.

from turnout import LLM, SamplingParams
outputs = LLM("runs/x").generate(["import os", "def"], SamplingParams(temperature=0, max_tokens=32))
"""

import atexit
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from .. import RequestError
from ..configs.typed import build
from ..parallel.config import ParallelConfig
from .beam import BeamSearch, BeamSearchOutput, BeamSearchParams
from .config import EngineConfig
from .core.sampling import MAX_LOGPROBS, SamplingParams
from .engine import Engine
from .outputs import FailedOutput, RequestOutput
from .prepare import Prompt
from .ranks import Ranks


class LLM:
    """One model for batch generation.

    Args:
        path: as `load_model` has it: a run, a model directory, a GGUF file.
        device: where it runs; None = the GPU if there is one.
        parallel: `ParallelConfig`'s fields (`{"ep": 2}`), in a program that torchrun starts on several ranks: rank 0
            goes on, the others compute what it orders and end with it, inside of this call. None = each for itself.
        options: `EngineConfig`'s fields (`max_num_seqs=8`, `dtype="bfloat16"`, ...); any number of prompts may wait.

    Raises:
        ConfigError: an unknown option, or one that does not fit. CheckpointError, DataError: the directory is broken.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | None = None,
        parallel: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        config = build(EngineConfig, {"max_waiting": sys.maxsize, **options})
        ranks = None if parallel is None else Ranks.join(build(ParallelConfig, dict(parallel)), config)
        self.engine = Engine.from_path(path, config, device, ranks)
        self._requests = 0
        if ranks is not None and ranks.leads:
            atexit.register(ranks.end)
        elif ranks is not None:
            ranks.follow()
            sys.exit(0)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts, batched continuously.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one for each; None = the defaults.

        Returns:
            One output a prompt, in the order of the prompts. A request that failed alone (logits that are not finite)
            has finish reason "abort" and an `error`.

        Raises:
            RequestError: a prompt or parameter that can not be served; nothing has run then.
        """
        wanted = _as_list(prompts)
        each = [params or SamplingParams()] * len(wanted) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(wanted):
            raise RequestError(
                f"params ({len(each)}) must be one, or one a prompt ({len(wanted)}): match them", "params"
            )
        return self._complete(wanted, each)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The most probable completions of the prompts, as transformers' `generate(num_beams=...)` finds them.

        Args:
            prompts: as in `generate`.
            params: for all prompts.

        Returns:
            One output a prompt, in the order of the prompts, with `beam_width` sequences, best first.

        Raises:
            RequestError: a prompt or parameter that can not be served. NonFiniteError: logits that are not finite.
        """
        searches = [self._search(prompt, params) for prompt in _as_list(prompts)]
        while asked := [(search, beam.tokens) for search in searches for beam in search.running]:
            each = [SamplingParams(temperature=0, max_tokens=1, logprobs=s.top, ignore_eos=True) for s, _ in asked]
            outputs = iter(self._complete([tokens for _, tokens in asked], each))
            for search in searches:
                search.advance([_next_logprobs(next(outputs)) for _ in search.running])
        decode = self.engine.tokenizer.decode
        return [
            BeamSearchOutput([replace(beam, text=decode(beam.tokens)) for beam in search.finished])
            for search in searches
        ]

    def _search(self, prompt: Prompt, params: BeamSearchParams) -> BeamSearch:
        config, model = self.engine.config, self.engine.model_config
        if model.encoder is not None:
            raise RequestError("beam_search needs a decoder-only model, this one has an encoder: use generate")
        eos = frozenset() if params.ignore_eos else frozenset(model.eos_token_ids)
        ids = self.engine.prepare("", prompt, SamplingParams()).prompt_token_ids
        if config.max_model_len is not None and len(ids) + params.max_tokens > config.max_model_len:
            rule = f"must not exceed max_model_len ({config.max_model_len}): shorten the prompt or lower max_tokens"
            raise RequestError(f"prompt ({len(ids)}) + max_tokens ({params.max_tokens}) {rule}", "max_tokens")
        search = BeamSearch(ids, params, eos)
        if search.top > MAX_LOGPROBS:
            rule = f"and one for each of the {len(eos)} end-of-sequence tokens must not exceed {MAX_LOGPROBS}"
            raise RequestError(f"beam_width ({params.beam_width}) {rule}: lower it", "beam_width")
        return search

    def _complete(self, wanted: Sequence[Prompt], each: Sequence[SamplingParams]) -> list[RequestOutput]:
        first, self._requests = self._requests, self._requests + len(wanted)
        names = [str(first + i) for i in range(len(wanted))]
        finished: dict[str, RequestOutput] = {}
        try:
            for request in zip(names, wanted, each, strict=True):
                self.engine.add_request(*request)
            while self.engine.has_unfinished:
                finished |= {output.request_id: output for output in self.engine.step() if output.finished}
        finally:
            self.engine.abort_all()  # nothing is left behind by an error or an interrupt
        return [finished[name] for name in names]


def _next_logprobs(output: RequestOutput) -> dict[int, float]:
    if isinstance(output, FailedOutput) and output.error is not None:
        raise output.error
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None, "they were asked for"
    return logprobs[0]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))
