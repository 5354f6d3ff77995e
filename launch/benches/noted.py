"""Cases of the operations that note where tokens went. T tokens, E experts, K choices."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .case import Arguments, Case

if TYPE_CHECKING:
    from .maker import Maker

LAYERS = 4


def noted_cases(op: str, m: "Maker", experts: int, top_k: int, slots: int) -> Iterator[Case]:
    """`op` of four layers' routings, and pages of so many slots."""
    for tokens in (1, 64, 2048):

        def make(tokens: int = tokens) -> Arguments:
            logits = [m.rows(tokens, experts, dtype=torch.float32) for _ in range(LAYERS)]
            ids = [x.topk(top_k).indices for x in logits]
            kept = [torch.ones_like(x, dtype=torch.bool) for x in ids]
            if op == "tally_routes":
                sums = torch.zeros(LAYERS, experts + 5, dtype=torch.float64, device=m.device)
                return [(sums, logits, ids, kept, kept)]
            pages = torch.zeros(slots, LAYERS, top_k, dtype=torch.int16, device=m.device)
            at = torch.randperm(slots, device=m.device)[:tokens]
            return [(pages, at, ids, kept)]

        read = tokens * (4 * experts + 10 * top_k if op == "tally_routes" else 11 * top_k)
        yield Case(op=op, shape=f"{tokens} tokens, {LAYERS} layers", size=LAYERS * read, flops=0, make=make)
