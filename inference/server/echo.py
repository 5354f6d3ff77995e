"""`echo`: a completion that begins with its prompt, in text, tokens and log-probabilities."""

from dataclasses import replace
from typing import Any

from ..outputs import CompletionOutput, RequestOutput
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import TextTokenizer


class Echo:
    """One prompt as its choices repeat it.

    Attributes:
        ids: the prompt's tokens.
        text: as it was sent, or what its tokens spell. A last character that they leave incomplete is not in it: the
            completion may complete it.
    """

    def __init__(self, tokenizer: TextTokenizer, output: RequestOutput, skip_special_tokens: bool) -> None:
        detokenizer = Detokenizer(tokenizer, (), skip_special_tokens, opens=True)
        self.ids = output.prompt_token_ids
        spelled = "".join(detokenizer.push(token) for token in self.ids)
        self.text = spelled if output.prompt is None else output.prompt

    def before(self, choice: CompletionOutput, output: RequestOutput) -> CompletionOutput:
        """The choice behind its prompt, of which the first token has no log-probability (None)."""
        logprobs: list[Any] | None = None
        if choice.logprobs is not None:
            logprobs = [*(output.prompt_logprobs or [None] * len(self.ids)), *choice.logprobs]
        ids = [*self.ids, *choice.token_ids]
        return replace(choice, text=self.text + choice.text, token_ids=ids, logprobs=logprobs)
