"""The console: its page at `/`, and what the page asks for beside the API, under `/v1/console/`.

The page is plain files, open to everybody; the numbers need the key like any other route.
"""

import asyncio
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..core.blocks import BlockManager
from ..core.request import Request as EngineRequest
from ..timeline import StepRecord
from .errors import ApiError, json_response
from .service import Service

if TYPE_CHECKING:
    from ..async_engine import AsyncEngine

FOLDER = Path(__file__).parent / "console"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MOST_SHARES = 30_000
"""In one answer, so that it takes the server some milliseconds at most; older steps are left out."""
SETTINGS = (
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_waiting", "block_size", "enable_prefix_caching",
    "dtype", "kv_dtype", "batching", "deterministic", "moe_capacity",
)  # fmt: skip


async def page(service: Service, request: Request) -> Response:
    """`GET /`."""
    return _static(request, "index.html")


async def file(service: Service, request: Request) -> Response:
    """`GET /console/NAME`."""
    return _static(request, request.path_params["name"])


async def state(service: Service, request: Request) -> Response:
    """`GET /v1/console/state`: the model, the settings, the queue, every KV block."""
    body: dict[str, Any] = {"model": service.model_name, "phase": service.phase, "created": service.created}
    if service.engine is not None:
        body |= await asyncio.to_thread(_state, service.engine)
    return json_response(body)


async def steps(service: Service, request: Request) -> Response:
    """`GET /v1/console/steps?since=K`: the engine's steps after number K, as far as they are kept."""
    given = request.query_params.get("since", "0")
    if not re.fullmatch("[0-9]{1,18}", given):
        message = f"since ({given}) must be the number of a step: use 0 for all that are kept"
        raise ApiError(400, message, param="since", code="invalid_value")
    if service.engine is None:
        return json_response({"clock": 0.0, "last": 0, "requests": [], "steps": []})
    timeline = service.engine.timeline
    last, found = timeline.last, _newest(timeline.since(int(given)))
    return json_response({"clock": _micro(timeline.clock()), "last": last} | _steps(found))


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Name → content and tag of every file of the page."""
    contents = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    return {name: (content, f'"{hashlib.sha256(content).hexdigest()[:32]}"') for name, content in contents.items()}


def _static(request: Request, name: str) -> Response:
    if name not in _files():
        raise HTTPException(404)
    content, tag = _files()[name]
    known = [given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")]
    headers = HEADERS | {"ETag": tag}
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=guess_type(name)[0])


def _state(engine: "AsyncEngine") -> dict[str, Any]:
    stats, config = engine.stats(), engine.config
    gauges = ("running", "waiting", "preemptions", "prefix_queries", "prefix_hits", "steps", "computed_tokens")
    return {
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "queue": {name: getattr(stats, name) for name in gauges},
        "kv": [_runs(pool) for pool in engine.pools],
        "moe": _moe(engine),
    }


def _runs(pool: BlockManager) -> dict[str, Any]:
    """A pool as runs of equal blocks: [state, how many, state, how many, ...] in the order of their ids."""
    runs: list[int] = []
    for state, blocks in groupby(pool.states()):
        runs += state, sum(1 for _ in blocks)
    return {"blocks": pool.num_usable, "runs": runs}


def _moe(engine: "AsyncEngine") -> dict[str, Any] | None:
    """The experts, and the layers whose `routed_experts` can be asked for; None = the model is dense."""
    moe = engine.model_config.moe
    if moe is None:
        return None
    return {"num_experts": moe.num_experts, "top_k": moe.top_k, "routed_layers": list(engine.routed)}


def _newest(steps: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """As many of the last ones as make an answer of bounded size."""
    room = MOST_SHARES
    for index in range(len(steps) - 1, -1, -1):
        room -= len(steps[index].shares)
        if room < 0:
            return steps[index + 1 :]
    return steps


def _steps(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """The steps, in which a request is its place in `requests`: [id, arrival, tokens of its prompt, when its
    first token was there or 0].

    A step's shares are one flat list: request, first token, how many, and 1 for a decode, 2 for the end of a prefill,
    which gives a token as well, 0 for any other chunk.
    """
    places: dict[EngineRequest, int] = {}

    def place(request: EngineRequest) -> int:
        return places.setdefault(request, len(places))

    rows = []
    for step in steps:
        shares: list[int] = []
        for share in step.each():
            shares += place(share.request), share.start, share.count, 1 if share.decodes else 2 * share.samples
        rows.append(
            {
                "number": step.number,
                "start": _micro(step.start),
                "seconds": _micro(step.seconds),
                "tokens": step.num_tokens,
                "running": step.running,
                "waiting": step.waiting,
                "usage": round(step.usage, 4),
                "preempted": [place(request) for request in step.preempted],
                "shares": shares,
            }
        )
    requests = [
        [request.id, _micro(request.arrival), len(request.prompt_token_ids), _micro(request.first_token)]
        for request in places
    ]
    return {"requests": requests, "steps": rows}


def _micro(seconds: float) -> float:
    return round(seconds, 6)
