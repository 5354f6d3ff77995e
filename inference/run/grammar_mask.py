"""Logits under grammars: what may not come next at −inf.

R rows (one a request), P of the rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.step import Scheduled


def hold_to_grammars(logits_RV: Tensor, items: Sequence[Scheduled]) -> Tensor:
    """Leave each row only the tokens that its grammar allows; rows without a grammar stay as they are.

    A token that ends its request is allowed exactly where the grammar accepts the text before it.
    """
    requests = [item.request for item in items]
    grammars = [(row, r.grammar, r.stop_ids) for row, r in enumerate(requests) if r.grammar is not None]
    if not grammars:
        return logits_RV
    vocabulary, device = logits_RV.shape[1], logits_RV.device
    packed = torch.frombuffer(bytearray(b"".join(grammar.mask for _, grammar, _ in grammars)), dtype=torch.uint8)
    bytes_PB1 = packed.to(device).view(len(grammars), -1, 1)
    allowed_PV = (bytes_PB1 >> torch.arange(8, device=device) & 1).flatten(1)[:, :vocabulary].bool()
    ends = [
        (at, token, grammar.accepts)
        for at, (_, grammar, stops) in enumerate(grammars)
        for token in stops
        if token < vocabulary
    ]
    if ends:
        at, tokens, accepts = torch.tensor(ends, device=device).unbind(1)
        allowed_PV[at, tokens] = accepts.bool()
    rows_P = torch.tensor([row for row, _, _ in grammars], device=device)
    return logits_RV.index_copy(0, rows_P, logits_RV[rows_P].masked_fill(~allowed_PV, -torch.inf))
