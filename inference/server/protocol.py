"""The requests of the OpenAI API that are served, as strict pydantic models: every number has its bounds.

Three kinds of fields: those that we serve (the models' fields), those of OpenAI and vLLM that we know but do not serve
(`neutral.py`), and unknown ones, refused.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from ..core.sampling import MAX_BIAS, MAX_CHOICES, MAX_LOGPROBS, PENALTIES, SamplingParams
from ..core.structured import StructuredOutputs
from . import neutral as known
from .errors import ApiError
from .messages import ChatInput
from .strict import INT32, TOKENS, UINT64, ModelName, Strict, TokenId, bad
from .structured import ResponseFormat, Shape, read_response_format, read_structured_outputs
from .tools import Tool, ToolChoice, check_tool_choice, forced_shape, read_tool_choice

MAX_PROMPTS = 1024
MAX_STOPS = 4
MAX_STOP_CHARS = 1000
MAX_BAD_WORDS = 256
MAX_BIASES = 1024
MAX_ALLOWED = 8192

Prompt = str | list[int]

SomeText = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Many = Field(min_length=1, max_length=MAX_PROMPTS)
Prompts = SomeText | Ids | Annotated[list[SomeText], Many] | Annotated[list[Ids], Many]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Biases = Annotated[
    dict[str, Bias], Field(max_length=MAX_BIASES, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,10}$"}})
]
"""What bodies may hold in these fields; the functions below read it, with better words for what is wrong."""


def _not_zero(value: int) -> int:
    if value == 0:
        raise bad("must be at least 1, or -1 for what the context holds beside the completion")
    return value


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad("must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise bad(f"must be at most {MAX_STOPS} texts, there are {len(stops)}")
    if not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise bad(f"each text must have 1 to {MAX_STOP_CHARS} characters")
    return stops


def _biases(value: object) -> dict[int, float]:
    """JSON has texts for keys only, so OpenAI's token ids are texts here."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise bad(f"must map at most {MAX_BIASES} token ids to numbers")
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= len(str(INT32))):
            raise bad("each key must be a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise bad(f"each bias must be a number from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    return {int(token): float(bias) for token, bias in value.items()}


def _prompts(value: object) -> list[Prompt]:
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise bad("must be a text, a list of texts, a list of token ids or a list of such lists, and not empty")
    if len(prompts) > MAX_PROMPTS:
        raise bad(f"must be at most {MAX_PROMPTS} prompts, there are {len(prompts)}")
    if not all(isinstance(p, str) for p in prompts) and not all(_is_ids(p) for p in prompts):
        raise bad("must be all texts, or all lists of token ids (whole numbers), none of the lists empty")
    if "" in prompts:
        raise bad("must not be empty")
    return prompts


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = known.STREAM_OPTIONS

    include_usage: bool = False


class GenerationRequest(Strict):
    """What both endpoints take, in OpenAI's and vLLM's names."""

    reasons: ClassVar[Mapping[str, str]] = known.REASONS

    model: ModelName
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], PlainValidator(_stops, json_schema_input_type=Stops)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] = Field(default_factory=list)
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=INT32)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=PENALTIES[0], le=PENALTIES[1])] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases, json_schema_input_type=Biases)] = Field(
        default_factory=dict
    )
    bad_words: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_BAD_WORDS)
    ] = Field(default_factory=list)
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    seed: Annotated[int, Field(ge=0, le=UINT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    routed_experts: bool = False
    return_token_ids: bool = False
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    structured_outputs: Annotated[
        StructuredOutputs | None, PlainValidator(read_structured_outputs, json_schema_input_type=Shape)
    ] = None
    response_format: Annotated[
        StructuredOutputs | None, PlainValidator(read_response_format, json_schema_input_type=ResponseFormat)
    ] = None
    truncate_prompt_tokens: (
        Annotated[int, Field(ge=-1, le=INT32, json_schema_extra={"not": {"const": 0}}), AfterValidator(_not_zero)]
        | None
    ) = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
        return self

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.response_format is not None and self.structured_outputs is not None:
            message = "response_format and structured_outputs exclude each other: set one"
            raise ApiError(400, message, param="response_format", code="invalid_value")
        return self

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            message = "prompt_logprobs come with stream: false only; echo with logprobs streams them"
            raise ApiError(400, message, param="prompt_logprobs", code="invalid_value")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def shape(self) -> StructuredOutputs | None:
        """What the text must look like."""
        return self.response_format or self.structured_outputs

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The engine's parameters; `max_tokens` None = what is left of the context.

        `prompt_logprobs` are what the endpoint wants of them, beside what the request asks for.

        Raises:
            RequestError: a combination that can not be served (`min_tokens` above `max_tokens`).
        """
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            bad_words=self.bad_words,
            allowed_token_ids=self.allowed_token_ids,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            logprobs=logprobs,
            prompt_logprobs=max((k for k in (prompt_logprobs, self.prompt_logprobs) if k is not None), default=None),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            routed_experts=self.routed_experts,
            structured_outputs=self.shape,
        )


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = known.COMPLETION

    prompt: Annotated[list[Prompt], PlainValidator(_prompts, json_schema_input_type=Prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=INT32, json_schema_extra=TOKENS)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_scoring(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens (0) needs echo: true", param="max_tokens", code="invalid_value")
        return self

    @property
    def score(self) -> int | None:
        """The prompt's log-probabilities that echo needs."""
        if self.echo and self.logprobs is not None:
            return self.logprobs
        return 0 if self.max_tokens == 0 else None


class ChatRequest(GenerationRequest, ChatInput):
    """`POST /v1/chat/completions`."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = known.CHAT

    max_tokens: Annotated[int, Field(ge=1, le=INT32, json_schema_extra=TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32, json_schema_extra=TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: Annotated[ToolChoice | None, PlainValidator(read_tool_choice, json_schema_input_type=ToolChoice)] = (
        None
    )
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check_tool_choice(self) -> Self:
        shaped = self.response_format is not None or self.structured_outputs is not None
        check_tool_choice(self.tools, self.tool_choice, shaped)
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools

    @property
    def shape(self) -> StructuredOutputs | None:
        forced = forced_shape(self.tools, self.tool_choice, self.parallel_tool_calls)
        return forced or super().shape

    @property
    def limit(self) -> int | None:
        """The most tokens to generate; None = what is left of the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
