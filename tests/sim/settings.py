"""What a simulated server is built with, and which requests it must refuse."""

import random

from turnout import RequestError
from turnout.inference.config import EngineConfig
from turnout.inference.core.request import QueueFullError, Request
from turnout.inference.core.scheduler import Scheduler


def draw_config(draw: random.Random, encoder: bool) -> EngineConfig:
    size = draw.choice((1, 2, 3, 4, 8))
    seats = draw.choice((1, 2, 3, 8))
    contiguous = not encoder and draw.random() < 0.1
    if contiguous:
        return EngineConfig(
            max_num_seqs=seats,
            max_num_batched_tokens=seats + draw.choice((0, 1, size, 64)),
            block_size=size,
            num_blocks=1 + draw.choice((4, 5, 9, 24)),
            max_model_len=4 * size - draw.choice((0, 1)),
            kv_layout="contiguous",
            max_waiting=draw.choice((2, 20, 100)),
        )
    return EngineConfig(
        max_num_seqs=seats,
        max_num_batched_tokens=seats
        + draw.choice((0, 1, size - 1, size, size + 1, 64))
        + (draw.choice((0, 3 * size)) if encoder else 0),
        block_size=size,
        num_blocks=1 + draw.choice((1, 2, 3, 5, 7, 10, 24)),
        max_model_len=draw.choice((None, None, 4 * size, 40)),
        enable_prefix_caching=draw.random() < 0.85,
        max_waiting=draw.choice((2, 20, 100)),
        batching=draw.choice(("continuous", "continuous", "continuous", "continuous", "static", "dynamic")),
        batch_window=draw.choice((0.0, 3.0)),
        queue_timeout=draw.choice((None, None, 30.0)),
    )


def refusal(scheduler: Scheduler, group: list[Request]) -> type[RequestError] | None:
    """The error that the request must meet, from its sizes alone."""
    config, total = scheduler.config, len(group[0].prompt_token_ids) + (group[0].params.max_tokens or 0)
    usable, size = scheduler.blocks.num_usable, config.block_size
    source = len(group[0].encoder_token_ids or ())
    if source:
        usable -= -(-source // size)
        if usable < 1 or source >= config.max_num_batched_tokens or source > (config.max_model_len or source):
            return RequestError
    slots = usable * size
    if total - (group[0].params.max_tokens != 0) > slots or (
        config.max_model_len is not None and total > config.max_model_len
    ):
        return RequestError
    if any(request.id in scheduler.requests for request in group):
        return RequestError
    queued = len(scheduler.waiting) + len(scheduler.held)
    return QueueFullError if queued + len(group) > config.max_waiting else None
