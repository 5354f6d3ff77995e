"""G1 to G6: start, requests over HTTP, metrics, the end."""

from ..row import Row

ROWS: list[Row] = []
