"""`/tokenize` and `/detokenize`: the model's tokenizer, in vLLM's fields."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ..prepare import check_ids
from . import neutral as known
from .errors import json_response
from .logprobs import spell
from .messages import ChatInput
from .parse import parse_json, read, read_body, understand
from .service import Service
from .strict import ModelName, Strict, TokenId

MAX_CHARS = 2**22
MAX_IDS = 2**21


class TokenizeText(Strict):
    """A text to be tokenized, as a completion's prompt is."""

    model: ModelName | None = None
    prompt: Annotated[str, Field(max_length=MAX_CHARS)]
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(ChatInput):
    """A chat to be tokenized, as a chat completion's is."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = known.RENDERED
    reasons: ClassVar[Mapping[str, str]] = known.REASONS

    model: ModelName | None = None
    return_token_strs: bool = False


class Detokenize(Strict):
    """Token ids to be spelled."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS)]


async def tokenize(service: Service, request: Request) -> Response:
    """`POST /tokenize`: the tokens of a text or a chat."""
    data = parse_json(await read_body(request))
    kind: type[TokenizeChat | TokenizeText] = TokenizeChat if data.get("messages") is not None else TokenizeText
    asked = understand(request, kind, data)
    _check_model(service, asked.model)
    engine = service.ready_engine()
    if isinstance(asked, TokenizeChat):
        ids = await asyncio.to_thread(asked.encode, engine.chat)
    else:
        ids = await asyncio.to_thread(engine.tokenizer.encode, asked.prompt, asked.add_special_tokens)
    strings = [spell(engine.tokenizer, token) for token in ids] if asked.return_token_strs else None
    found: dict[str, Any] = {"count": len(ids), "max_model_len": engine.config.max_model_len, "tokens": ids}
    return json_response(found | {"token_strs": strings})


async def detokenize(service: Service, request: Request) -> Response:
    """`POST /detokenize`: the text of tokens, control tokens included."""
    asked = await read(request, Detokenize)
    _check_model(service, asked.model)
    engine = service.ready_engine()
    check_ids("tokens", asked.tokens, engine.model_config.vocab_size)
    text = await asyncio.to_thread(engine.tokenizer.decode, asked.tokens, False)
    return json_response({"prompt": text})


def _check_model(service: Service, name: str | None) -> None:
    if name is not None:
        service.check_model(name)
