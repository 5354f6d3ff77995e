"""Two steps that are nobody's: a prefill and a decode, as large as they come. Whoever computes them first finds kernels
compiled, shapes known and memory touched."""

from ..moe.config import ModelConfig
from .config import EngineConfig
from .core.replicas import JointPlan, Replicas
from .core.request import Request
from .core.sampling import SamplingParams
from .core.scheduler import Scheduler
from .core.step import Scheduled, StepPlan
from .faults import probe
from .run.executor import Executor

FIRST_TOKENS = 16384
"""So many tokens find the KV cache's memory there: a step that waits for new pages takes twice its time."""


def rehearse(executor: Executor, scheduler: Scheduler | Replicas, config: EngineConfig, model: ModelConfig) -> None:
    """Compute them, in every replica, before there is a request: they write into blocks that nobody has.

    Args:
        config: resolved: `max_model_len` and `num_blocks` are numbers.
    """
    for plan in _plans(config, model):
        parts = [plan] * len(scheduler.schedulers) if isinstance(scheduler, Replicas) else None
        executor.launch(plan if parts is None else JointPlan.of(parts))
        executor.collect()


def _plans(config: EngineConfig, model: ModelConfig) -> list[StepPlan]:
    if model.encoder is not None:
        return [probe(encoder=True)]
    assert config.num_blocks is not None, "the KV plan has set it"
    assert config.max_model_len is not None, "the engine has set it"
    room = min(config.max_model_len, (config.num_blocks - 1) * config.block_size)
    count = max(1, min(config.max_num_batched_tokens, room - 1))
    tokens = tuple(i % model.vocab_size for i in range(count + 1))  # different ones go to different experts
    request = Request(id="", prompt_token_ids=tokens, params=SamplingParams(temperature=0.0))
    table = tuple(range(1, -(-(count + 1) // config.block_size) + 1))
    return [_step(request, 0, count, table), _step(request, count, 1, table)]


def _step(request: Request, start: int, count: int, table: tuple[int, ...]) -> StepPlan:
    item = Scheduled(
        request=request,
        start=start,
        count=count,
        token_ids=request.token_ids[start : start + count],
        block_table=table,
        samples=True,
    )
    return StepPlan(scheduled=(item,), num_tokens=count, preempted=(), expired=())
