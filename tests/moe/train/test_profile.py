"""The profiler records the steps it is asked for on every rank, changes nothing, and can never stop a run."""

import contextlib
import gzip
import io
import json

import pytest

from turnout.moe.train.profile import union
from turnout.tests.helpers import poison
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def told(run: str, words: list[str]) -> str:
    """Train; what this rank printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert poison.train(run, words, {}) == "done"
    return out.getvalue()


def test_every_rank_leaves_a_trace_of_the_steps_and_rank_0_a_table(data, tmp_path):
    words = tiny(data, "parallel.ep=2")
    first, second = run_ranks(told, 2, str(tmp_path / "on"), [*words, "train.profile=2"])
    for rank in range(2):
        with gzip.open(tmp_path / "on" / "profile" / f"rank-{rank:05d}.json.gz") as file:
            names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
        steps = {name for name in names if name.startswith("ProfilerStep")}
        assert len(steps) == 2
        assert {"gloo:all_to_all", "gloo:all_reduce", "aten::mm"} <= set(names)
    assert "profile: 2 steps of " in first
    assert "operator" in first
    for name in ("all-to-all", "all-reduce"):
        share = float(first.split(f"{name} under way: ")[1].split("%")[0])
        assert 0 < share <= 100
    assert "profile:" not in second
    told_off = run_ranks(told, 2, str(tmp_path / "off"), words)
    assert "profile:" not in told_off[0]
    assert not (tmp_path / "off" / "profile").exists()
    assert fingerprint(tmp_path / "on", 6) == fingerprint(tmp_path / "off", 6)


def test_a_profiler_that_can_not_write_is_a_warning(data, tmp_path):
    (tmp_path / "profile").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="train.profile left no trace on rank 0.*profile"):
        assert poison.train(str(tmp_path), tiny(data, "train.profile=1"), {}) == "done"


def test_a_run_that_ends_in_the_warm_up_says_so_and_one_that_ends_early_keeps_what_it_has(data, tmp_path):
    with pytest.warns(RuntimeWarning, match="ended in its warm-up of 3 steps"):
        told(str(tmp_path / "short"), tiny(data, "train.steps=3", "train.profile=5"))
    assert "profile: 2 steps of " in told(str(tmp_path / "early"), tiny(data, "train.steps=5", "train.profile=5"))


def test_intervals_that_overlap_count_once():
    assert union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
    assert union([]) == 0.0
