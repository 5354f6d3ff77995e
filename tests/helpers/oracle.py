"""A real engine whose model is an oracle: every next token is a known function of all tokens before it.

The function is the simulator's `HashModel`, spelled in letters. What a step knows of the tokens before its own it reads
through the request's block table, slot by slot, so that an alias, a stale or a missing block is a wrong letter.
"""

import string
from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.step import StepPlan
from turnout.inference.engine import Engine
from turnout.inference.run.batch import Batch, build_batch
from turnout.tests.sim.doubles import PRIME, HashModel

LETTERS = string.ascii_letters + string.digits
SURE = 50.0  # nats between the oracle's token and all others


class Oracle(HashModel):
    """Stands for the model of `engine`, which it takes over: its forward pass stores a value for each token and is
    sure of the next one.

    Attributes:
        end: the token that ends a text.
        ids: what may come: that token, or one of a letter.
        poison: a token after which nothing is a number.
    """

    def __init__(self, engine: Engine) -> None:
        (self.end,) = engine.model_config.eos_token_ids
        self.ids = [self.end, *(engine.tokenizer.encode(letter)[0] for letter in LETTERS)]
        self._spelled = dict(zip(self.ids, ["", *LETTERS], strict=True))
        self.poison = engine.model_config.vocab_size - 1
        self._runner, self._vocabulary = engine.runner, engine.model_config.vocab_size
        plan = engine.runner.cache.plan
        self._size, self._values = plan.block_size, [-1] * (plan.num_blocks * plan.block_size)
        engine.runner.forward = self._forward

    def next_token(self, value: int, choice: int) -> int:
        return self.ids[((value + choice) * 1442695040888963407 % PRIME >> 17) % len(self.ids)]

    def answer(self, prompt: Sequence[int], max_tokens: int, choice: int = 0, *, endless: bool = False) -> list[int]:
        """What the choice must say after the prompt; `endless`: the end of a text does not end it."""
        stops = [] if endless else [self.end]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=stops)
        return self.complete(Request("asked", prompt, params, choice=choice))[0]

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(self._spelled[token] for token in tokens)

    def _forward(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        size, values, said = self._size, self._values, []
        for source, target in plan.copies:
            values[target * size : (target + 1) * size] = values[source * size : (source + 1) * size]
        batch = build_batch(plan, size, torch.device("cpu"), newest=self._runner._newest)
        places = zip(batch.slots_T.tolist(), batch.tokens_T.tolist(), strict=True)
        for item in plan.scheduled:
            block, offset = divmod(item.start - 1, size)
            value = values[item.block_table[block] * size + offset] if item.start else self.root(item.request)
            for _ in range(item.count):
                slot, token = next(places)
                values[slot] = value = self.value(value, token)
            if item.samples:
                said.append(self.next_token(value, item.request.choice))
        logits_RV = torch.zeros(len(said), self._vocabulary)
        logits_RV[range(len(said)), said] = SURE
        for row, item in enumerate(batch.sampling):
            if item.request.prompt_token_ids[-1] == self.poison:
                logits_RV[row] = torch.nan
        return batch, logits_RV
