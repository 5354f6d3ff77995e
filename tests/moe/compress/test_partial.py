"""A compressed model while it is made: what is finished is found again, what is broken is named."""

import pytest
import torch

from turnout import CheckpointError
from turnout.moe.compress.partial import STATES, Partial


def test_finished_blocks_are_found_again_and_those_that_go_leave_no_gap(tmp_path):
    first = Partial(tmp_path / "m", {"a": 1})
    first.put_ends({"embed.weight": torch.ones(2)})
    first.put({"w": torch.zeros(3)}, {"x": torch.zeros(1)}, {"error": 0.5})
    first.put(None, {"x": torch.ones(1)}, {"gone": True})
    first.put({"w": torch.ones(3)}, {"x": torch.full((1,), 2.0)}, {})
    again = Partial(tmp_path / "m", {"a": 1})
    assert (again.done, again.notes) == (3, [{"error": 0.5}, {"gone": True}, {}])
    assert again.states() == {"x": 2}
    assert set(again.tensors()) == {"embed.weight", "blocks.0.w", "blocks.1.w"}
    assert again.tensors()["blocks.1.w"].all()
    assert Partial(tmp_path / "m", {"a": 2}).done == 0, "another plan begins anew"


def test_what_is_somebodys_own_is_not_thrown_away(tmp_path):
    mine = tmp_path / "partial-m" / "letter.txt"
    mine.parent.mkdir()
    mine.write_text("dear")
    with pytest.raises(CheckpointError, match=r"letter.txt is no part of a compression: move it away"):
        Partial(tmp_path / "m", {})
    assert mine.read_text() == "dear"


def test_a_file_that_does_not_read_is_named_with_what_to_do(tmp_path):
    first = Partial(tmp_path / "m", {})
    first.put({}, {}, {})
    (first.directory / STATES).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"states.safetensors does not read .*: remove .*partial-m"):
        Partial(tmp_path / "m", {})
