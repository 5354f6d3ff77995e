"""What a request's tokens and words are checked and turned into before the engine takes it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .. import RequestError
from ..moe.config import ModelConfig
from .core.sampling import SamplingParams
from .text.tokenizer import TextTokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked request that has not been added yet; where there is an encoder, the prompt is its input."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""


def admissible(params: SamplingParams, tokenizer: TextTokenizer, model: ModelConfig) -> SamplingParams:
    """`params` with the bad words as token sequences.

    Raises:
        RequestError: a token id outside the vocabulary, bad words that leave none of the allowed tokens, or prompt
            log-probabilities of what an encoder reads.
    """
    if params.prompt_logprobs is not None and model.encoder is not None:
        rule = "can not be given: an encoder reads the prompt and predicts none of it"
        raise RequestError(f"prompt_logprobs ({params.prompt_logprobs}) {rule}", "prompt_logprobs")
    bias: Mapping[int, float] = params.logit_bias or {}
    for field, ids in (
        ("stop_token_ids", params.stop_token_ids or ()),
        ("logit_bias", bias),
        ("bad_token_ids", [token for sequence in params.bad_sequences for token in sequence]),
        ("allowed_token_ids", params.allowed_token_ids or ()),
    ):
        check_ids(field, ids, model.vocab_size)
    if not params.bad_words:
        return params
    spelled = {ids for word in params.bad_words for ids in spellings(word, tokenizer)}
    return replace(params, bad_words=None, bad_token_ids=[*params.bad_sequences, *sorted(spelled)])


def check_ids(field: str, ids: Iterable[object], vocab_size: int) -> None:
    """Raise RequestError for what is no token id of the vocabulary."""
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise RequestError(f"{field} ({token!r}) must hold token ids from 0 to {vocab_size - 1}", field)


def spellings(word: str, tokenizer: TextTokenizer) -> set[tuple[int, ...]]:
    """The token sequences of a word where a text begins and after a blank."""
    texts = (word.lstrip() or word, " " + word.lstrip(), word)
    return {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts} - {()}
