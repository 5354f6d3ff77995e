"""On-policy distillation: some rows of a step go on as the student itself would, and the teacher judges those.

    author = Author(config, rows, model, generate)
    batch = author.rewrite(batch, cursor, step)      # before the forward pass, on every rank alike

A row keeps its first tokens; the student writes the rest at temperature 1 with the weights of this very step, document
behind document, as the stream would have them. Which rows these are, and the random numbers of each, follow from (seed,
step, the row's number in the run): the same at every layout, and again after a resumption.

Source: Agarwal et al. 2306.13649 (GKD), algorithm 1, by rows in place of whole steps, with the divergence of `Teacher`.

T tokens of one micro-batch, R rows of it, G rows of the global batch, S row length.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ...configs.typed import check
from ..data.rows import Batch, Cursor, Rows, segments
from ..models.decoder import Decoder
from ..routing.registry import ROUTERS
from .config import RunConfig

# model in evaluation mode, prompts, tokens to write behind each, 64-bit keys, the token that ends a text → what follows
Generate = Callable[[Decoder, Sequence[Sequence[int]], Sequence[int], Sequence[int], int], list[list[int]]]


class Author:
    """The student as the one who writes.

    Args:
        config: a run with `train.distill.on_policy`.
        rows: the run's.
        model: the student, whole on this rank.
        generate: goes on with prompts; it is composed above this floor (`inference.write`).

    Raises:
        ConfigError: nobody says how to generate, or nobody can with its router.
    """

    def __init__(self, config: RunConfig, rows: Rows, model: Decoder, generate: Generate | None) -> None:
        how = config.train.distill
        assert how is not None
        fix = "start the run by `turnout train`, or give generate=turnout.inference.write.write"
        check(generate is not None, "train.distill.on_policy", how.on_policy, "needs someone who generates", fix)
        assert generate is not None
        moe, rule = config.model.moe, "looks at tokens that a text which is being written does not have yet"
        causal = moe is None or ROUTERS[moe.router].causal
        check(causal, "moe.router", moe and moe.router, rule, "use another router, or train.distill.on_policy=0")
        self.generate, self.model, self.rows = generate, model, rows
        self.a_step, self.prompt = how.written(config.train.global_batch), how.on_policy_prompt
        self.seed, self.global_batch, self.seq_len = config.seed, config.train.global_batch, config.train.seq_len

    def rewrite(self, batch: Batch, cursor: Cursor, step: int) -> Batch:
        """The micro-batch, of the step that starts at `cursor`, with what the student writes in place of some rows."""
        whole = self.rows.batch(cursor, self.global_batch)
        chosen = self.choose(whole, step)
        own = len(chosen) * (self.seq_len - self.prompt)
        total = batch.total_tokens - len(chosen) * self.seq_len + own
        mine = [row for row, number in enumerate(self._numbers(batch)) if number in chosen]
        written_R = torch.zeros(len(batch.tokens_T) // self.seq_len, dtype=torch.bool)
        written_R[mine] = True
        told = replace(
            batch, total_tokens=total, written_tokens=own, written_T=written_R.repeat_interleave(self.seq_len)
        )
        return self._fill(told, mine, step) if mine else told

    def choose(self, whole: Batch, step: int) -> set[int]:
        """Numbers of the rows of a global batch that are written: its share, to the row, over the steps."""
        full_G = (whole.targets_T.view(-1, self.seq_len) >= 0).all(-1).tolist()
        numbers = [number for number, full in zip(self._numbers(whole), full_G, strict=True) if full]
        count = int((step + 1) * self.a_step) - int(step * self.a_step)
        return set(sorted(numbers, key=lambda number: self._key(step, number, 0))[:count])

    def _fill(self, batch: Batch, mine: Sequence[int], step: int) -> Batch:
        tokens_RS = batch.tokens_T.view(-1, self.seq_len).clone()
        targets_RS = batch.targets_T.view(-1, self.seq_len).clone()
        numbers = self._numbers(batch)
        prompts = [tokens_RS[row, : self.prompt].tolist() for row in mine]
        tokens_RS[mine] = torch.tensor(self._write(prompts, [numbers[row] for row in mine], step))
        targets_RS[mine] = -1
        for row in mine:
            targets_RS[row, self.prompt - 1 : -1] = tokens_RS[row, self.prompt :]
        begins_RS = batch.positions_T.view_as(tokens_RS) == 0
        begins_RS[mine] = tokens_RS[mine] == self.rows.stream.eos_id
        positions_T, cu_seqlens = segments(begins_RS.numpy())
        tokens_T, targets_T = tokens_RS.view(-1), targets_RS.view(-1)
        return replace(batch, tokens_T=tokens_T, targets_T=targets_T, positions_T=positions_T, cu_seqlens=cu_seqlens)

    def _write(self, rows: list[list[int]], numbers: Sequence[int], step: int) -> list[list[int]]:
        """The rows, filled: where a text ends the next begins, and sees nothing of it."""
        end = self.rows.stream.eos_id
        self.model.eval()
        while short := [at for at, row in enumerate(rows) if len(row) < self.seq_len]:
            texts = [rows[at][_begin(rows[at], end) :] for at in short]
            counts = [self.seq_len - len(rows[at]) for at in short]
            keys = [self._key(step, numbers[at], len(rows[at])) for at in short]
            for at, more in zip(short, self.generate(self.model, texts, counts, keys, end), strict=True):
                rows[at] += more
        self.model.train()
        return rows

    def _numbers(self, batch: Batch) -> list[int]:
        """Each row's number in the run, which no other row of any epoch has."""
        return (batch.index_T[:: self.seq_len] // self.seq_len).tolist()

    def _key(self, step: int, number: int, place: int) -> int:
        """64 bits for what row `number` does in a step from token `place` on; 0 = whether it is written at all."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{step}/{number}/{place}".encode()).digest()[:8], "little")


def _begin(row: Sequence[int], end: int) -> int:
    """Where the text begins that a row ends in."""
    return int(np.flatnonzero(np.array([True, *(token == end for token in row[1:])]))[-1])
