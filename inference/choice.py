"""One choice of a request as its caller sees it: tokens, text, log-probabilities, finish reason.

The scheduler knows tokens only; stop strings and characters are decided here, one token at a time.
"""

from .core.request import FinishReason, Request
from .outputs import CompletionOutput
from .routed import RoutedExperts
from .run.experts import RoutedRows
from .run.prompt import PromptLogprobs
from .text.detokenizer import Detokenizer
from .text.stop import StopText
from .text.tokenizer import TextTokenizer


class Choice:
    """The growing output of one scheduler request.

    Attributes:
        request_id: the caller's id; all choices of a request share it.
        request: the scheduler's side of this choice.
        finish_reason: set once; then nothing changes any more.
        prompt_logprobs: of the prompt's tokens so far, the first of which has none.
    """

    def __init__(
        self, request_id: str, request: Request, tokenizer: TextTokenizer, routed: RoutedExperts | None = None
    ) -> None:
        params = request.params
        self.request_id = request_id
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[dict[int, float] | None] = [None]
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, float]] | None = None if params.logprobs is None else []
        self._routed = routed
        opens = request.encoder_token_ids is not None
        before = () if opens else request.prompt_token_ids
        self._detokenizer = Detokenizer(tokenizer, before, params.skip_special_tokens, opens)
        self._text = StopText(params.stop or (), params.include_stop_str_in_output)

    def advance(self, token: int, logprobs: dict[int, float] | None, reason: FinishReason | None) -> None:
        """Take the next token.

        Args:
            token: its id.
            logprobs: of this token, when asked for.
            reason: the scheduler's, when this token ends the request. A stop string that completes in it wins.
        """
        assert self.finish_reason is None, "a finished choice gets no token"
        params = self.request.params
        self._token_ids.append(token)
        if self._logprobs is not None:
            assert logprobs is not None, "the sampler reports every request that asked"
            self._logprobs.append(logprobs)
        if reason == "stop" and token in self.request.stop_ids and not params.include_stop_str_in_output:
            self.finish("stop")  # the stop token is no part of the text
            return
        search = len(self._token_ids) > params.min_tokens
        if self._text.push(self._detokenizer.push(token), search):
            self.finish_reason = "stop"
        elif reason is not None:
            self.finish(reason)

    def report(self, rows: RoutedRows) -> None:
        """Take where the tokens of a step went; without effect when the choice has ended."""
        if self.finish_reason is None and self._routed is not None:
            self._routed.take(rows)
            self.request.num_reported_tokens = self._routed.count

    def score(self, found: PromptLogprobs) -> None:
        """Take log-probabilities of prompt tokens; what a preempted request computes again stays as it was."""
        known = len(self.prompt_logprobs)
        assert found.first <= known, "a prompt is computed from its beginning"
        self.prompt_logprobs += found.tokens[known - found.first :]

    def finish(self, reason: FinishReason) -> None:
        """End the choice and show what was held back; without effect when it has ended."""
        if self.finish_reason is None:
            self._text.push(self._detokenizer.flush(), search=False)
            self.finish_reason = reason

    def output(self) -> CompletionOutput:
        """A snapshot for the caller."""
        return CompletionOutput(
            index=self.request.choice,
            text=self._text.shown if self.finish_reason is None else self._text.text,
            token_ids=list(self._token_ids),
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=self.finish_reason,
            routed_experts=None if self._routed is None else self._routed.rows,
        )
