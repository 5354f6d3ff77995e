"""The routes. Plain Starlette: bodies are parsed by our own strict parser, so FastAPI's would only be a second one."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ... import TurnoutError
from ..core.sampling import SamplingParams
from .answers import Answer, ChatAnswer
from .errors import ApiError, answer_error, to_json
from .parse import parse_json, read_body, validate
from .protocol import ChatRequest, CompletionRequest, GenerationRequest, Prompt
from .service import Service
from .shell import CountAnswers, RequireKey
from .stream import EventStream, frames, unless_gone

R = TypeVar("R", bound=GenerationRequest)


def create_app(service: Service) -> ASGIApp:
    """The ASGI application of one server."""
    api = Api(service)
    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/metrics", api.metrics),
    ]
    handlers = {TurnoutError: answer_error, HTTPException: answer_error, Exception: answer_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    known = frozenset(route.path for route in routes)
    return CountAnswers(RequireKey(app, service.config.api_key), service.metrics, known)


class Api:
    """The handlers of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked = await self._read(request, CompletionRequest)
        engine = self._service.ready_engine()
        params = asked.sampling_params(asked.max_tokens, asked.logprobs, asked.score)
        opens = engine.model_config.encoder is not None
        if asked.echo and opens:
            rule = "can not be true: the model is an encoder-decoder, whose completions do not go on with the prompt"
            raise ApiError(400, f"echo {rule}", param="echo", code="invalid_value")
        answer = Answer(asked, engine.tokenizer, opens, echo=asked.echo)
        return await self._generate(request, asked, asked.prompt, params, answer)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = await self._read(request, ChatRequest)
        engine = self._service.ready_engine()
        opens = engine.model_config.encoder is not None
        if opens and not engine.chat.own:
            rule = "is an encoder-decoder without a chat template, and has no use for a transcript: use /v1/completions"
            raise ApiError(400, f"model ({asked.model}) {rule}", param="model", code="no_chat_template")
        params = asked.sampling_params(asked.limit, (asked.top_logprobs or 0) if asked.logprobs else None)
        prompt = await asyncio.to_thread(engine.chat.encode, asked.chat)
        answer = ChatAnswer(asked, engine.tokenizer, opens)
        return await self._generate(request, asked, [prompt], params, answer)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        self._service.check_model(request.path_params["name"])
        return _json(self._model())

    async def health(self, request: Request) -> Response:
        """`GET /health`: whether the process works; it does while it shuts down."""
        healthy = self._service.phase in ("ready", "shutting down")
        return _json({"status": self._service.phase}, 200 if healthy else 503)

    async def ready(self, request: Request) -> Response:
        """`GET /ready`: whether new requests are taken."""
        return _json({"status": self._service.phase}, 200 if self._service.phase == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(generate_latest(self._service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _read(self, request: Request, model: type[R]) -> R:
        asked = validate(model, parse_json(await read_body(request, self._service.config.max_body_bytes)))
        self._service.check_model(asked.model)
        return asked

    async def _generate(
        self,
        request: Request,
        asked: GenerationRequest,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        answer: Answer,
    ) -> Response:
        """Run the prompts and answer, in one piece or as a stream. An error before the first output has its status."""
        config = self._service.config
        with ExitStack() as cleanup:
            generation = self._service.start(prompts, params, answer.id, asked.priority, asked.cache_salt or "")
            cleanup.callback(self._service.end, generation)
            if not asked.stream:
                await unless_gone(request.receive, generation.finished())
                return Response(answer.whole(generation), media_type="application/json")
            await unless_gone(request.receive, generation.started(config.keepalive_seconds))
            body, close = frames(answer.chunks(generation)), cleanup.pop_all().close
            return EventStream(body, close, config.stall_seconds, config.keepalive_seconds)

    def _model(self) -> dict[str, object]:
        name = self._service.model_name
        return {"id": name, "object": "model", "created": self._service.created, "owned_by": "turnout"}


def _json(value: object, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
