"""What a server says about itself: probes, metrics, its model, its version."""

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from ... import __version__
from .errors import json_response
from .service import Service


async def health(service: Service, request: Request) -> Response:
    """`GET /health`: whether the process works; it does while it shuts down."""
    healthy = service.phase in ("ready", "shutting down")
    return json_response({"status": service.phase}, 200 if healthy else 503)


async def ready(service: Service, request: Request) -> Response:
    """`GET /ready`: whether new requests are taken."""
    return json_response({"status": service.phase}, 200 if service.phase == "ready" else 503)


async def metrics(service: Service, request: Request) -> Response:
    """`GET /metrics`, for Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def load(service: Service, request: Request) -> Response:
    """`GET /load`: calls in flight, in vLLM's words."""
    return json_response({"server_load": len(service.calls)})


async def version(service: Service, request: Request) -> Response:
    """`GET /version`."""
    return json_response({"version": __version__})


async def models(service: Service, request: Request) -> Response:
    """`GET /v1/models`."""
    return json_response({"object": "list", "data": [_model(service)]})


async def model(service: Service, request: Request) -> Response:
    """`GET /v1/models/NAME`."""
    service.check_model(request.path_params["name"])
    return json_response(_model(service))


def _model(service: Service) -> dict[str, object]:
    """OpenAI's model object; the context's length is vLLM's addition, known once the engine is."""
    length = None if service.engine is None else service.engine.config.max_model_len
    described = {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "turnout"}
    return described | {"max_model_len": length}
