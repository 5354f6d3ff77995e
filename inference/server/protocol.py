"""The requests of the OpenAI API that are served, as strict pydantic models: every number has its bounds.

Three kinds of fields: those that we serve (the models' fields), those of OpenAI and vLLM that we know but do not serve
(`NEUTRAL`: accepted where their value changes nothing, because real clients send them), and unknown ones, refused.
A null is the same as leaving the field out.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from ..core.sampling import MAX_BIAS, MAX_CHOICES, MAX_LOGPROBS, PENALTIES, SamplingParams
from ..core.structured import StructuredOutputs
from .errors import ApiError
from .structured import read_response_format, read_structured_outputs

INT32 = 2**31 - 1
UINT64 = 2**64 - 1
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_STOPS = 4
MAX_STOP_CHARS = 1000
MAX_BAD_WORDS = 256
MAX_BIASES = 1024
MAX_ALLOWED = 8192

Prompt = str | list[int]
TokenId = Annotated[int, Field(ge=0, le=INT32)]


class Anything(tuple[object, ...]):
    """The neutral values of a field that never changes the answer: all of them."""

    def __contains__(self, value: object) -> bool:
        return True


ANYTHING = Anything()
LABELS: dict[str, Sequence[object]] = dict.fromkeys(
    ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), ANYTHING
)
NEUTRAL: dict[str, Sequence[object]] = LABELS | {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
}
NEUTRAL_COMPLETION: dict[str, Sequence[object]] = NEUTRAL | {"suffix": ("",)}
NEUTRAL_CHAT: dict[str, Sequence[object]] = NEUTRAL | {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_MESSAGE: dict[str, Sequence[object]] = {
    "name": ANYTHING,
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}


class Strict(BaseModel):
    """No conversions, no NaN, no unknown fields; nulls and neutral fields are dropped first."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, Sequence[object]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | cls.neutral.keys()
        kept = {}
        for name, value in data.items():
            if name in known and value is None:
                continue
            if name not in cls.neutral:
                kept[name] = value
            elif not _is_neutral(value, cls.neutral[name]):
                message = f"{name} is not served by this server: leave it out"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        return kept


def _is_neutral(value: object, neutral: Sequence[object]) -> bool:
    return isinstance(neutral, Anything) or any(
        value == wanted and isinstance(value, bool) == isinstance(wanted, bool) for wanted in neutral
    )


def _bad(message: str) -> PydanticCustomError:
    return PydanticCustomError("bad_value", "{rule}", {"rule": message})


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _bad("must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise _bad(f"must be at most {MAX_STOPS} texts, there are {len(stops)}")
    if not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise _bad(f"each text must have 1 to {MAX_STOP_CHARS} characters")
    return stops


def _biases(value: object) -> dict[int, float]:
    """JSON has texts for keys only, so OpenAI's token ids are texts here."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise _bad(f"must map at most {MAX_BIASES} token ids to numbers")
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= len(str(INT32))):
            raise _bad("each key must be a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise _bad(f"each bias must be a number from {-MAX_BIAS:g} to {MAX_BIAS:g}")
    return {int(token): float(bias) for token, bias in value.items()}


def _prompts(value: object) -> list[Prompt]:
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise _bad("must be a text, a list of texts, a list of token ids or a list of such lists, and not empty")
    if len(prompts) > MAX_PROMPTS:
        raise _bad(f"must be at most {MAX_PROMPTS} prompts, there are {len(prompts)}")
    if not all(isinstance(p, str) for p in prompts) and not all(_is_ids(p) for p in prompts):
        raise _bad("must be all texts, or all lists of token ids (whole numbers), none of the lists empty")
    if "" in prompts:
        raise _bad("must not be empty")
    return prompts


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)


def _text(value: object) -> object:
    """A message's content as text: OpenAI also allows a list of parts, of which only text can be served."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise _bad('must be a text or a list of parts {"type": "text", "text": ...}')
        if not isinstance(part["text"], str):
            raise _bad("the text of each part must be a string")
    return "\n".join(part["text"] for part in value)


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class GenerationRequest(Strict):
    """What both endpoints take, in OpenAI's and vLLM's names."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], PlainValidator(_stops)] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] = []
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=INT32)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=PENALTIES[0], le=PENALTIES[1])] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases)] = {}
    bad_words: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_BAD_WORDS)
    ] = []
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    seed: Annotated[int, Field(ge=0, le=UINT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    routed_experts: bool = False
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    structured_outputs: Annotated[StructuredOutputs, PlainValidator(read_structured_outputs)] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
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
        return self.structured_outputs

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

    neutral: ClassVar[Mapping[str, Sequence[object]]] = NEUTRAL_COMPLETION

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=INT32)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False

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


class Message(Strict):
    """One message of a chat."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = NEUTRAL_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)] = ""


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = NEUTRAL_CHAT

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Annotated[StructuredOutputs | None, PlainValidator(read_response_format)] = None

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.response_format is not None and self.structured_outputs is not None:
            message = "response_format and structured_outputs exclude each other: set one"
            raise ApiError(400, message, param="response_format", code="invalid_value")
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        return self

    @property
    def shape(self) -> StructuredOutputs | None:
        return self.response_format or self.structured_outputs

    @property
    def chat(self) -> list[dict[str, str]]:
        """The messages for the chat template; `developer` is OpenAI's newer name of `system`."""
        names = {"developer": "system"}
        return [{"role": names.get(m.role, m.role), "content": m.content} for m in self.messages]

    @property
    def limit(self) -> int | None:
        """The most tokens to generate; None = what is left of the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
