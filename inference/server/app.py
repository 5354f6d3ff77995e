"""The table of routes. Plain Starlette: bodies are parsed by our own strict parser, so FastAPI's would only be a second
one."""

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ... import TurnoutError
from . import console, experts, generate, openapi, status, tokens
from .errors import answer_error
from .lenient import TellIgnored
from .limits import Limits
from .logs import Entry, LogRequests, write_line
from .requests import NameRequests
from .service import Service
from .shell import CountAnswers, RequireKey

Handler = Callable[[Service, Request], Awaitable[Response]]
ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/completions", generate.completions),
    ("POST", "/v1/chat/completions", generate.chat),
    ("POST", "/v1/embeddings", generate.embeddings),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("GET", "/v1/models", status.models),
    ("GET", "/v1/models/{name:path}", status.model),
    ("GET", "/v1/experts", experts.experts),
    ("GET", "/v1/console/state", console.state),
    ("GET", "/v1/console/steps", console.steps),
    ("GET", "/", console.page),
    ("GET", "/console/{name}", console.file),
    ("GET", "/health", status.health),
    ("GET", "/ready", status.ready),
    ("GET", "/load", status.load),
    ("GET", "/version", status.version),
    ("GET", "/metrics", status.metrics),
    ("GET", "/openapi.json", openapi.openapi),
]


def create_app(service: Service) -> ASGIApp:
    """The ASGI application of one server."""
    routes = [Route(path, partial(handler, service), methods=[method]) for method, path, handler in ROUTES]
    handlers = {TurnoutError: answer_error, HTTPException: answer_error, Exception: answer_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    known = frozenset(route.path for route in routes)
    told = TellIgnored(app) if service.config.compat == "lenient" else app
    protected = Limits(RequireKey(told, service.config.api_key), service.config)
    sinks: list[Callable[[Entry], None]] = [write_line] if service.traces is None else [write_line, service.traces]
    return LogRequests(CountAnswers(NameRequests(protected), service.metrics, known), sinks)
