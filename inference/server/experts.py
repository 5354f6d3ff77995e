"""`/v1/experts`: which experts work, by layer and logical expert, since start and just now."""

import re
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError, json_response
from .history import LONGEST
from .service import Service

if TYPE_CHECKING:
    from ...moe.routing.stats import RoutingSnapshot

USUAL = 10
BY_LAYER = {
    "expert_load": "shares",
    "router_entropy": "entropy",
    "layer_drop_fraction": "drop_fraction",
    "load_max_mean": "load_max_mean",
    "load_cv": "load_cv",
    "dead_experts": "dead_experts",
}
"""Names of training's rows → ours, where a layer is an object."""


async def experts(service: Service, request: Request) -> Response:
    """`GET /v1/experts?seconds=10`."""
    seconds = _seconds(request)
    engine = service.engine or service.ready_engine()
    snapshot = engine.stats().routing
    moe = engine.model_config.moe
    if moe is None or not snapshot.layers:
        message = f"model ({service.model_name}) is dense: it has no experts. Serve a mixture of experts"
        raise ApiError(404, message, param="model", code="no_experts")
    length, recent = service.history.window(snapshot, seconds)
    return json_response(
        {
            "object": "experts",
            "model": service.model_name,
            "num_experts": moe.num_experts,
            "top_k": moe.top_k,
            "since_start": {"seconds": service.history.uptime} | _sums(snapshot),
            "window": {"seconds": length} | _sums(recent),
        }
    )


def _sums(snapshot: "RoutingSnapshot") -> dict[str, Any]:
    """Every layer's counts before drops, what was dropped of them, and what follows from the sums."""
    fields, counts, dropped = snapshot.fields(), snapshot.counts(), snapshot.dropped()
    layers = [
        {"layer": layer, "counts": counts[row], "dropped": dropped[row]}
        | {ours: fields[theirs][row] for theirs, ours in BY_LAYER.items()}
        for row, layer in enumerate(fields["moe_layers"])
    ]
    return {"layers": layers}


def _seconds(request: Request) -> int:
    """The window that is asked for.

    Raises:
        ApiError: 400 for another parameter, or what is no whole number of seconds in bounds.
    """
    for name in request.query_params:
        if name != "seconds":
            message = f"{name} is not a parameter of this endpoint: leave it out"
            raise ApiError(400, message, param=name, code="unknown_parameter")
    text = request.query_params.getlist("seconds") or [str(USUAL)]
    if len(text) != 1 or not re.fullmatch("[0-9]{1,4}", text[0]) or not 1 <= int(text[0]) <= LONGEST:
        message = f"seconds ({', '.join(text)}) must be one whole number from 1 to {LONGEST}"
        raise ApiError(400, message, param="seconds", code="invalid_value")
    return int(text[0])
