"""Steps that are not finite are skipped whole, as often in a row as is allowed, and resuming stays exact."""

import json
import math

import pytest

from turnout import ConfigError
from turnout.launch.compose import compose
from turnout.moe.train.trace import read_trace
from turnout.tests.helpers import poison
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny

NAN = math.nan


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def test_a_skipped_step_leaves_no_mark_on_any_rank(data, tmp_path):
    words = tiny(data, "moe=deepseek_v3", "parallel.ep=2", "train.skip_nonfinite=1", "train.steps=4", "moe.trace=true")
    assert run_ranks(poison.train, 2, str(tmp_path / "run"), words, {2: NAN}) == ["done", "done"]
    assert run_ranks(poison.train, 2, str(tmp_path / "other"), words, {}, None, (2, 3)) == ["done", "done"]
    assert fingerprint(tmp_path / "run", 4) == fingerprint(tmp_path / "other", 4)
    assert rows(tmp_path / "run", "skip") == [{"kind": "skip", "step": 3, "epoch": 0, "row": 8, "in_a_row": 1}]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run"))
    note = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert (note["step"], note["cursor"], note["losses"][1]) == (2, {"epoch": 0, "row": 8}, "nan")
    ours, theirs = (read_trace(tmp_path / name, 2)["index"] for name in ("run", "other"))
    assert ours.tolist() == theirs.tolist()


def test_the_skipped_batch_would_be_seen(data, tmp_path):
    words = tiny(data, "train.steps=4")
    poison.train(str(tmp_path / "all"), words, {})
    poison.train(str(tmp_path / "skips"), [*words, "train.skip_nonfinite=1"], {2: NAN})
    assert fingerprint(tmp_path / "all", 2) == fingerprint(tmp_path / "skips", 2)
    assert fingerprint(tmp_path / "all", 4) != fingerprint(tmp_path / "skips", 4)


@pytest.mark.parametrize(
    ("allowed", "bad", "end"),
    [(0, (1,), "of step 1 is"), (1, (1, 3), "done"), (1, (1, 2), "(1 in a row were skipped"), (2, (1, 2), "done")],
)
def test_only_so_many_in_a_row_are_skipped(data, tmp_path, allowed, bad, end):
    words = tiny(data, f"train.skip_nonfinite={allowed}", "train.steps=3")
    assert end in poison.train(str(tmp_path), words, dict.fromkeys(bad, NAN))
    assert len(rows(tmp_path, "skip")) == min(allowed, len(bad)) + (bad == (1, 3))


def test_a_run_killed_between_two_skips_resumes_to_the_same_bits(data, tmp_path):
    words, bad = tiny(data, "train.skip_nonfinite=2"), {2: NAN, 3: NAN}
    assert poison.train(str(tmp_path / "whole"), words, bad) == "done"
    assert poison.train(str(tmp_path / "parts"), words, bad, kill_after=3) == "killed"
    assert len(rows(tmp_path / "parts", "skip")) == 1
    assert poison.train(str(tmp_path / "parts"), [*words, "train.resume=true"], bad) == "done"
    assert fingerprint(tmp_path / "whole", 6) == fingerprint(tmp_path / "parts", 6)
    assert rows(tmp_path / "whole", "skip") == rows(tmp_path / "parts", "skip")
    assert [row["row"] for row in rows(tmp_path / "parts", "skip")] == [8, 12]


def test_a_limit_below_zero_is_refused(data):
    with pytest.raises(ConfigError, match=r"train\.skip_nonfinite \(-1\) must not be negative"):
        compose(tiny(data, "train.skip_nonfinite=-1"))
