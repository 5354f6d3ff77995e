"""Every letter has its tests, and every one of them can fail: each mutant turns its test red."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from .row import Row
from .table import LATER, LETTERS, ROWS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
QUICK = ("I3", "P6")

Judge = Callable[[Row], dict]


@pytest.fixture(scope="session")
def judge() -> Iterator[Judge]:
    """Runs a row's first test under its mutant."""
    path = os.pathsep.join([str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(HERE / "jury.py")]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, **pipe) as jury:

        def ask(row: Row) -> dict:
            jury.stdin.write(json.dumps({"test": row.tests[0]} | asdict(row.mutant)) + "\n")
            jury.stdin.flush()
            return json.loads(jury.stdout.readline())

        yield ask
        jury.stdin.close()


def killed(judge: Judge, row: Row) -> None:
    found = judge(row)
    assert found["failures"], f"the mutant lives:\n{found['log']}"
    assert set(found["failures"]) <= {"AssertionError", "Failed"}, f"it broke otherwise:\n{found['log']}"


def test_no_letter_is_missing():
    proven = {row.letter for row in ROWS}
    assert proven <= set(LETTERS)
    assert set(LETTERS) - proven == LATER.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.letter)
def test_every_named_test_exists_and_has_the_letter_in_its_name(row):
    for test in row.tests:
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
        assert name.startswith("test_"), test
        assert row.letter in name.split("_"), test
        assert Path(path).name.startswith("test_"), test


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.letter)
def test_every_mutant_is_one_change(row):
    mutant = row.mutant
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant
    assert mutant.old != mutant.new


@pytest.mark.parametrize("row", [row for row in ROWS if row.letter in QUICK], ids=lambda row: row.letter)
def test_a_mutant_turns_its_test_red(judge, row):
    killed(judge, row)


@pytest.mark.full
@pytest.mark.parametrize("row", [row for row in ROWS if row.letter not in QUICK], ids=lambda row: row.letter)
def test_every_mutant_turns_its_test_red(judge, row):
    killed(judge, row)


def test_a_change_without_effect_kills_nobody(judge):
    (row,) = (row for row in ROWS if row.letter == QUICK[0])
    same = Row(row.letter, row.tests, type(row.mutant)(row.mutant.file, '"""The block', '"""A block'))
    found = judge(same)
    assert found["failures"] == []
    assert " passed" in found["log"]
