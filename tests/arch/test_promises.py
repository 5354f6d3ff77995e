"""The table of promises names tests that exist, each in the tier that it says."""

import ast
import re

import pytest

ROW = re.compile(
    r"^\| (?P<promise>[^|]+) \| (?P<tier>quick|full|soak) \| `(?P<path>tests/[\w/]+\.py)(?:::(?P<name>\w+))?` \|$"
)


def rows(root):
    lines = (root / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|")][2:]


def test_every_row_names_a_test_in_its_tier(root):
    assert len(rows(root)) >= 20
    for row in rows(root):
        found = ROW.match(row)
        assert found, f"not a row: {row}"
        tree = ast.parse((root / found["path"]).read_text(encoding="utf-8"))
        tests = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        if found["name"] is None:
            assert found["tier"] == "quick", f"a whole file is quick: {row}"
            assert any(name.startswith("test_") for name in tests)
            continue
        assert found["name"] in tests, f"no such test: {row}"
        marks = {ast.unparse(decorator) for decorator in tests[found["name"]].decorator_list}
        tiers = [tier for tier in ("full", "soak") if f"pytest.mark.{tier}" in marks] or ["quick"]
        assert tiers == [found["tier"]], f"the tier is another: {row}"


@pytest.mark.parametrize("broken", ["| a | slow | `tests/x.py` |", "| a | quick | `x.py::test_a` |", "| a | quick | |"])
def test_a_row_without_tier_or_test_is_no_row(broken):
    assert ROW.match(broken) is None
