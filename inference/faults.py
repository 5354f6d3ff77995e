"""When a step has raised: the simplest step there is, which tells a request's own fault from a broken engine's."""

import logging

from .core.request import Request
from .core.sampling import SamplingParams
from .core.step import Scheduled, StepPlan
from .errors import StepError

logger = logging.getLogger(__name__)

NULL_BLOCK = (0,)


def probe(encoder: bool) -> StepPlan:
    """One token whose keys and values go to the null block, where nobody reads them; with an encoder, one of its
    tokens too."""
    source = (0,) if encoder else None
    request = Request(id="", prompt_token_ids=(0,), params=SamplingParams(), encoder_token_ids=source)
    memory, encoded = (NULL_BLOCK, 1) if encoder else ((), 0)
    item = Scheduled(
        request=request,
        start=0,
        count=1,
        token_ids=request.token_ids,
        block_table=NULL_BLOCK,
        samples=True,
        memory_table=memory,
        encoded=encoded,
    )
    return StepPlan(scheduled=(item,), num_tokens=item.cost, preempted=(), expired=())


def step_error(cause: Exception) -> StepError:
    """What the caller of a request is told whose computation raised `cause`; the log has the traceback."""
    logger.error("a request failed: %s", cause, exc_info=cause)
    error = StepError(f"computing the request raised {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
