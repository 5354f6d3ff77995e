"""A1 to A12, the abort matrix: a request goes from wherever it stands, and takes nothing with it.

A1 waiting, A2 mid-chunk, A3 in the launched step, A4 in decode, A5 preempted, A6 waiting for a grammar, A7 last token
already sampled, A8 n > 1 with one choice finished, A9 unknown id, A10 id twice, A11 all, A12 the client is gone: before
the first byte, mid-stream, on a call in one piece.
"""

from ..row import Row

ROWS: list[Row] = []
