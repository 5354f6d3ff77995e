"""docs/moe_layer.md: its example runs, and it names every field there is."""

import dataclasses
import re
from pathlib import Path

import torch

from turnout.moe import RouteContext, Routing

PAGE = (Path(__file__).parents[3] / "docs" / "moe_layer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_runs(capsys):
    names = {}
    exec(BLOCKS[0], names)  # noqa: S102
    assert names["routing"].counts_E.sum() == 2 * 128
    assert "balance" in capsys.readouterr().out


def test_the_checkpointing_lines_run():
    block, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    names = {"block": block, "x": x}
    exec(BLOCKS[1], names)  # noqa: S102
    assert torch.equal(names["y"], block(x))


def test_every_other_block_is_python():
    for block in BLOCKS[2:]:
        compile(block, "docs/moe_layer.md", "exec")


def test_every_field_has_its_line():
    for record in (RouteContext, Routing):
        for field in dataclasses.fields(record):
            assert re.search(rf"^\|.*`{field.name}`.*\|", PAGE, re.MULTILINE), field.name
