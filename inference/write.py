"""Text of token ids alone: many prompts go on at once, by the scheduler, cache and model runner that serve.

Whoever trains a model lets it write so: the module itself computes, with the weights that it has now, and the cache is
free again before the next training pass.
"""

import time
from collections.abc import Sequence

from ..moe.models.decoder import Decoder
from .config import EngineConfig
from .core.request import Request
from .core.sampling import SamplingParams
from .machine import Machine

AT_ONCE = 16
"""Requests that run beside one another; the cache has room for so many of the longest."""


def write(
    model: Decoder, prompts: Sequence[Sequence[int]], counts: Sequence[int], seeds: Sequence[int], end: int
) -> list[list[int]]:
    """Go on with each prompt at temperature 1. On a CPU no text depends on what is written beside it, to the bit.

    Args:
        model: in evaluation mode; nothing of it is copied or changed.
        prompts: token ids, at least one each.
        counts: how many tokens to write behind each, at least one.
        seeds: 64-bit keys of their random numbers; the same key, prompt and weights give the same text.
        end: the token that ends a text early, as its last. Where logits are not finite a text ends so as well: the
            training pass that reads it votes on them.

    Raises:
        ConfigError: the cache does not fit the memory.
    """
    longest = max(len(prompt) + count for prompt, count in zip(prompts, counts, strict=True))
    at_once, defaults = min(len(prompts), AT_ONCE), EngineConfig()
    config = EngineConfig(
        max_num_seqs=at_once,
        num_blocks=1 + at_once * -(-longest // defaults.block_size),
        max_model_len=longest,
        max_waiting=len(prompts),
        enable_prefix_caching=False,
        deterministic=model.device.type == "cpu",
        overlap=False,
    )
    machine = Machine(model, config, time.monotonic)
    requests = [
        Request(id=str(i), prompt_token_ids=prompt, params=_params(count, end), seed=seed)
        for i, (prompt, count, seed) in enumerate(zip(prompts, counts, seeds, strict=True))
    ]
    machine.scheduler.add(*requests)
    while any(request.finish_reason is None for request in requests):
        plan = machine.scheduler.schedule()
        machine.executor.launch(plan)
        sampled = machine.executor.collect().sampled
        machine.scheduler.commit(plan, {i: end if it.token is None else it.token for i, it in sampled.items()})
    return [request.output_token_ids for request in requests]


def _params(count: int, end: int) -> SamplingParams:
    return SamplingParams(temperature=1, max_tokens=count, stop_token_ids=[end], ignore_eos=True)
