"""The bodies of answers, as the API's description has them; a test holds real answers to them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Reason = Literal["stop", "length", "abort", "tool_calls"]
PromptLogprobs = list[dict[str, dict[str, Any]] | None]
Experts = list[list[list[int]]]


class Body(BaseModel):
    """Fields that are not here do not come."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorFields(Body):
    """What is wrong."""

    message: Annotated[str, Field(min_length=1, max_length=500)]
    type: str
    param: str | None
    code: str | None


class Error(Body):
    """OpenAI's error object."""

    error: ErrorFields


class CachedTokens(Body):
    """Prompt tokens that need not be computed."""

    cached_tokens: Count


class Usage(Body):
    """Tokens of a call."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Body):
    """Log-probabilities of a completion, a number a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class Choice(Body):
    """What both kinds of choices have."""

    index: Count
    finish_reason: Reason
    token_ids: list[Count] = []
    routed_experts: Experts = []


class CompletionChoice(Choice):
    """One completion."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[Count] = []
    prompt_logprobs: PromptLogprobs | None = None


class Answer(Body):
    """What both kinds of answers have."""

    id: str
    created: Count
    model: str
    usage: Usage


class Completion(Answer):
    """`POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Entry(Body):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class TopEntry(Entry):
    """The same with the most probable ones beside it."""

    top_logprobs: list[Entry]


class ChatLogprobs(Body):
    """Log-probabilities of a chat's answer."""

    content: list[TopEntry]
    refusal: None


class CalledFunction(Body):
    """A function and its arguments, as the model wrote them."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that the model wants."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Body):
    """What the model says; the content is null where it only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(Choice):
    """One answer."""

    message: Message
    logprobs: ChatLogprobs | None


class Chat(Answer):
    """`POST /v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[Count] = []
    prompt_logprobs: PromptLogprobs | None = None


class Tokens(Body):
    """`POST /tokenize`."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | None


class Text(Body):
    """`POST /detokenize`."""

    prompt: str


class Model(Body):
    """The model; its context's length is null until it is loaded."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Count | None


class Models(Body):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Layer(Body):
    """What one layer's router did, by logical expert."""

    layer: Count
    counts: list[Count]
    dropped: Count
    shares: list[Share]
    entropy: float
    drop_fraction: Share
    load_max_mean: float
    load_cv: float
    dead_experts: Count


class Load(Body):
    """What the routers did in a time."""

    seconds: Annotated[float, Field(ge=0)]
    layers: list[Layer]


class ExpertsLoad(Body):
    """`GET /v1/experts`."""

    object: Literal["experts"]
    model: str
    num_experts: Count
    top_k: Count
    since_start: Load
    window: Load


class Status(Body):
    """`GET /health` and `GET /ready`."""

    status: Literal["loading", "ready", "shutting down", "broken"]


class ServerLoad(Body):
    """`GET /load`: calls in flight."""

    server_load: Count


class Version(Body):
    """`GET /version`."""

    version: str


class ConsoleNumbers(BaseModel):
    """What the console's page asks for: its own affair, which may change."""

    model_config = ConfigDict(extra="allow")
