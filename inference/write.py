"""Text of token ids alone: many prompts go on at once, by the scheduler, cache and model runner that serve.

Whoever trains a model lets it write so: the module itself computes, with the weights that it has now, and the cache is
free again before the next training pass.
"""

import sys
import time
from collections.abc import Sequence

import torch

from ..moe.config import ModelConfig
from ..moe.models.decoder import Decoder
from .config import EngineConfig
from .core.request import Request
from .core.sampling import SamplingParams
from .machine import Machine
from .run.memory import plan_memory

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
    machine = Machine(model, _settings(len(prompts), longest, model.device.type == "cpu"), time.monotonic)
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


def needed(model: ModelConfig, prompts: int, longest: int) -> int:
    """Bytes that writing takes beside float32 weights, at most: a step and the cache.

    Args:
        prompts: how many go on, at least one.
        longest: tokens of a prompt and what is written behind it.
    """
    plan = plan_memory(model, _settings(prompts, longest), longest, torch.float32, weights=0, free=sys.maxsize)
    return plan.activations + plan.cache


def _settings(prompts: int, longest: int, deterministic: bool = False) -> EngineConfig:
    at_once, defaults = min(prompts, AT_ONCE), EngineConfig()
    return EngineConfig(
        max_num_seqs=at_once,
        num_blocks=1 + at_once * -(-longest // defaults.block_size),
        max_model_len=longest,
        max_waiting=prompts,
        enable_prefix_caching=False,
        deterministic=deterministic,
        overlap=False,
    )


def _params(count: int, end: int) -> SamplingParams:
    return SamplingParams(temperature=1, max_tokens=count, stop_token_ids=[end], ignore_eos=True)
