"""What `deterministic=true` costs: the same steps with the library's kernels and with ours, on the same model."""

import time
from dataclasses import dataclass

from ..moe.models.decoder import Decoder
from .config import EngineConfig
from .core.blocks import BlockManager
from .core.request import Request
from .core.sampling import SamplingParams
from .core.scheduler import Scheduler
from .run.kv import plan_kv
from .run.runner import ModelRunner


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of the fastest step of each kind, sampling included.

    Args:
        prefill: of one whole prompt.
        decode: of one token of every running request.
    """

    prefill: float
    decode: float


@dataclass(frozen=True, kw_only=True)
class DeterministicCost:
    """Both ways, and the shapes they were measured with; `str` is a table."""

    prompt: int
    batch: int
    fast: StepCost
    deterministic: StepCost

    def __str__(self) -> str:
        rows = (
            (f"prefill of {self.prompt} tokens", self.fast.prefill, self.deterministic.prefill),
            (f"decode of {self.batch} requests", self.fast.decode, self.deterministic.decode),
        )
        return "\n".join(
            f"{name:26} {fast * 1e3:8.2f} ms  deterministic {slow * 1e3:8.2f} ms  ({slow / fast:.2f} x)"
            for name, fast, slow in rows
        )


def deterministic_cost(model: Decoder, *, prompt: int = 256, batch: int = 8, steps: int = 16) -> DeterministicCost:
    """Measure `model` (in evaluation mode, on a CPU) with `batch` requests of `prompt` tokens and `steps` more each."""
    fast, slow = (_measure(model, deterministic, prompt, batch, steps) for deterministic in (False, True))
    return DeterministicCost(prompt=prompt, batch=batch, fast=fast, deterministic=slow)


def _measure(model: Decoder, deterministic: bool, prompt: int, batch: int, steps: int) -> StepCost:
    config = EngineConfig(
        max_num_seqs=batch, max_num_batched_tokens=prompt + batch, enable_prefix_caching=False,
        max_model_len=prompt + steps, deterministic=deterministic,
    )  # fmt: skip
    plan = plan_kv(model.cfg, config, prompt + steps, model.dtype, 1 << 40)
    blocks = BlockManager(plan.num_blocks, config.block_size, enable_prefix_caching=False)
    scheduler, runner = Scheduler(config, blocks, time.monotonic), ModelRunner(model, plan, form=config.form)
    vocabulary, prefills, decodes = model.cfg.vocab_size, [], []
    for arrival in range(batch):
        text = [(arrival * 7919 + at * 31) % vocabulary for at in range(prompt)]
        params = SamplingParams(max_tokens=steps, ignore_eos=True, temperature=0)
        scheduler.add(Request(id=str(arrival), prompt_token_ids=text, params=params))
    while scheduler.requests:
        step = scheduler.schedule()
        start = time.perf_counter()
        sampled = runner.execute(step).sampled
        took = time.perf_counter() - start
        if all(item.count == 1 for item in step.scheduled) and len(step.scheduled) == batch:
            decodes.append(took)
        elif any(item.count == prompt for item in step.scheduled):
            prefills.append(took)
        scheduler.commit(step, {name: result.token for name, result in sampled.items() if result.token is not None})
    return StepCost(prefill=min(prefills), decode=min(decodes))
