"""M1 to M10: routing, experts and ranks."""

from ..row import Row

ROWS: list[Row] = []
