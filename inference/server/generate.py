"""Completions and chats: a request's way from its body to its answer, whole or as a stream."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from ..core.sampling import SamplingParams
from .answers import Answer, ChatAnswer
from .errors import ApiError
from .parse import read, read_body
from .protocol import ChatRequest, CompletionRequest, GenerationRequest, Prompt
from .service import Service
from .stream import EventStream, frames, unless_gone
from .tool_answers import ToolAnswer

if TYPE_CHECKING:
    from ..async_engine import AsyncEngine


async def completions(service: Service, request: Request) -> Response:
    """`POST /v1/completions`."""
    asked = await read(request, CompletionRequest)
    service.check_model(asked.model)
    engine = service.ready_engine()
    params = asked.sampling_params(asked.max_tokens, asked.logprobs, asked.score)
    opens = engine.model_config.encoder is not None
    if asked.echo and opens:
        rule = "can not be true: the model is an encoder-decoder, whose completions do not go on with the prompt"
        raise ApiError(400, f"echo {rule}", param="echo", code="invalid_value")
    answer = Answer(asked, engine.tokenizer, opens, echo=asked.echo)
    prompts = [await _encoded(engine, asked, prompt) for prompt in asked.prompt]
    return await _generate(service, request, asked, prompts, params, answer)


async def chat(service: Service, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    asked = await read(request, ChatRequest)
    service.check_model(asked.model)
    engine = service.ready_engine()
    opens = engine.model_config.encoder is not None
    if opens and not engine.chat.own:
        rule = "is an encoder-decoder without a chat template, and has no use for a transcript: use /v1/completions"
        raise ApiError(400, f"model ({asked.model}) {rule}", param="model", code="no_chat_template")
    params = asked.sampling_params(asked.limit, (asked.top_logprobs or 0) if asked.logprobs else None)
    prompt = _cut(await asyncio.to_thread(asked.encode, engine.chat), asked, engine.config.max_model_len, asked.limit)
    answer = (ToolAnswer if asked.shown_tools else ChatAnswer)(asked, engine.tokenizer, opens)
    return await _generate(service, request, asked, [prompt], params, answer)


async def _encoded(engine: "AsyncEngine", asked: CompletionRequest, prompt: Prompt) -> Prompt:
    """A prompt as the engine is to have it: as it came, unless its tokens matter."""
    if asked.add_special_tokens and asked.truncate_prompt_tokens is None:
        return prompt
    if isinstance(prompt, str):
        prompt = await asyncio.to_thread(engine.tokenizer.encode, prompt, asked.add_special_tokens)
    return _cut(prompt, asked, engine.config.max_model_len, asked.max_tokens)


def _cut(ids: list[int], asked: GenerationRequest, context: int | None, most: int | None) -> list[int]:
    """The last `truncate_prompt_tokens` of a prompt; -1 = what the context holds beside `most` tokens."""
    wanted = asked.truncate_prompt_tokens
    if wanted is None:
        return ids
    assert context is not None, "the engine has resolved it"
    return ids[-(max(1, context - (1 if most is None else most)) if wanted == -1 else wanted) :]


async def _generate(
    service: Service,
    request: Request,
    asked: GenerationRequest,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    answer: Answer,
) -> Response:
    """Run the prompts and answer, in one piece or as a stream. An error before the first output has its status."""
    config = service.config
    with ExitStack() as cleanup:
        generation = service.start(prompts, params, answer.id, asked.priority, asked.cache_salt or "")
        cleanup.callback(service.end, generation)
        if not asked.stream:
            await unless_gone(request.receive, generation.finished())
            return Response(answer.whole(generation), media_type="application/json")
        await unless_gone(request.receive, generation.started(config.keepalive_seconds))
        body, close = frames(answer.chunks(generation)), cleanup.pop_all().close
        return EventStream(body, close, config.stall_seconds, config.keepalive_seconds)


async def embeddings(service: Service, request: Request) -> Response:
    """`POST /v1/embeddings`: refused, also by the official client's name for it."""
    await read_body(request)
    rule = "is a language model that continues text: it has no embedding of a text to give. Serve an embedding model"
    raise ApiError(400, f"model ({service.model_name}) {rule}", param="model", code="unsupported_endpoint")
