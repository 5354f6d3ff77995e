"""docs/engine.md: its programs run."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1])
def test_a_program_runs(block, model_dir, capsys):
    exec(block.replace("runs/NAME", str(model_dir)), {})  # noqa: S102
    assert capsys.readouterr().out
