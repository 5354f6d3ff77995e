"""Offline generation, as users of vLLM know it.

from turnout import LLM, SamplingParams
outputs = LLM("runs/x").generate(["import os", "def"], SamplingParams(temperature=0, max_tokens=32))
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from .. import RequestError
from ..configs.typed import build
from .config import EngineConfig
from .core.sampling import SamplingParams
from .engine import Engine, Prompt
from .outputs import RequestOutput


class LLM:
    """One model for batch generation.

    Args:
        path: as `load_model` has it: a run, a model directory, a GGUF file.
        device: where it runs; None = the GPU if there is one.
        options: `EngineConfig`'s fields (`max_num_seqs=8`, `dtype="bfloat16"`, ...); any number of prompts may wait.

    Raises:
        ConfigError: an unknown option, or one that does not fit. CheckpointError, DataError: the directory is broken.
    """

    def __init__(self, path: str | Path, *, device: str | None = None, **options: Any) -> None:
        self.engine = Engine.from_path(path, build(EngineConfig, {"max_waiting": sys.maxsize, **options}), device)
        self._requests = 0

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


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))
