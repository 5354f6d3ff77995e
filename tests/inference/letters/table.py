"""All letters, where each is proven, and what of it is still to come.

The rows stand in `rows/`, a file for a group of letters or for a part of the engine; every file there counts.
"""

import importlib
from pathlib import Path

from .row import Row

GROUPS = {"I": 10, "P": 10, "A": 12, "O": 12, "M": 10, "G": 6}
LETTERS = [f"{group}{number}" for group, last in GROUPS.items() for number in range(1, last + 1)]

LATER = {
    "M5": "experts are not moved while they serve",
    "M8": "experts are not offloaded",
    "G2": "there is no speculation",
}
"""Letters of what the engine does not do yet, so that nothing can break them."""


def _rows() -> list[Row]:
    files = sorted((Path(__file__).parent / "rows").glob("*.py"))
    modules = [importlib.import_module(f".rows.{file.stem}", __package__) for file in files]
    return [row for module in modules for row in module.ROWS]


ROWS = _rows()
