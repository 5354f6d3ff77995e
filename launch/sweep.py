"""`turnout train -m key=a,b`: every combination of the swept values, composed and validated before the first one runs.

The combinations run one after another, each a run of its own under `runs/<time>-sweep/<number>`; a table ends it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console
from rich.table import Table

from .. import ConfigError
from . import rundir
from .cli import write_json
from .compose import compose, parse
from .launcher import launch, summary

STOPPED = (130, 143)


def main(words: Sequence[str], result: str | None = None) -> int:
    """Run a sweep; 0 when every run ended well, else the first code that was not 0.

    Args:
        words: `key=value` with sweeps in Hydra's grammar (`a,b`, `range(1,4)`, `choice(...)`).
        result: where to write the table as JSON.
    """
    swept = [override.key_or_group for override in parse(words) if override.is_sweep_override()]
    if not swept:
        raise ConfigError("-m has nothing to sweep: give a key several values, as in seed=1,2")
    combinations = product([word for word in words if not word.startswith("run=")])
    composed = [compose(combination) for combination in combinations]
    root = _root(words)
    rows: list[dict[str, Any]] = []
    for number, (combination, run) in enumerate(zip(combinations, composed, strict=True)):
        directory = root / str(number)
        directory.mkdir(exist_ok=True)
        code = launch(directory, run, combination)
        values = dict(word.split("=", 1) for word in combination)
        rows.append({**{key: values[key] for key in swept}, **summary(directory), "code": code})
        if code in STOPPED:
            break
    wide = None if sys.stdout.isatty() else 160
    Console(file=sys.stdout, width=wide).print(table(rows, swept))
    write_json(result, {"runs": rows})
    return next((row["code"] for row in rows if row["code"] != 0), 0)


def product(words: Sequence[str]) -> list[list[str]]:
    """The combinations of all swept values, the last key varying fastest."""
    overrides = OverridesParser.create().parse_overrides(overrides=list(words))
    batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [list(combination) for batch in batches for combination in batch]


def table(rows: Sequence[dict[str, Any]], swept: Sequence[str]) -> Table:
    """One line a run: what was swept, and how it ended."""
    columns = [*swept, "step", "loss", "val_loss", "bits_per_byte", "tokens_per_second", "drop_fraction", "code"]
    found = Table(title="sweep")
    for column in columns:
        found.add_column(column)
    for row in rows:
        found.add_row(*(_cell(row.get(column)) for column in columns))
    return found


def _root(words: Sequence[str]) -> Path:
    """The sweep's directory, made: `run=DIR`, or a new one."""
    given = [word.partition("=")[2] for word in words if word.startswith("run=")]
    if not given:
        return rundir.new_directory("sweep")
    Path(given[-1]).mkdir(parents=True, exist_ok=True)
    return Path(given[-1])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
