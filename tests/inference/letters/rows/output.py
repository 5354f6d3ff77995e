"""O1 to O12: what a caller gets to see."""

from ..row import Row

ROWS: list[Row] = []
