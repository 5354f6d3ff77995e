"""What a request is told that can not go on; and, when a step has raised, the simplest step there is, which tells a
request's own fault from a broken engine's."""

import logging

from .. import NonFiniteError, RequestError, TurnoutError
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


def no_token(request: Request, excluded: bool) -> TurnoutError:
    """Why a request has no next token: it has excluded them all, or its logits are not finite."""
    if not excluded:
        return NonFiniteError("the logits of this request are not finite: check the model's weights")
    wanted, grammar = request.params.structured_outputs, request.grammar
    if wanted is None or grammar is None:
        rule = "have excluded every token at this point: allow more or exclude fewer"
        return RequestError(f"allowed_token_ids, bad words and min_tokens {rule}", "allowed_token_ids")
    reason = f" ({grammar.error})" if grammar.error else ""
    rule = f"allows no token after {request.num_output_tokens}{reason}"
    return wanted.error(f"{rule}: loosen it, or what else excludes tokens")


def step_error(cause: Exception) -> StepError:
    """What the caller of a request is told whose computation raised `cause`; the log has the traceback."""
    logger.error("a request failed: %s", cause, exc_info=cause)
    error = StepError(f"computing the request raised {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
