"""Training in float16: the loss scale changes no result, finds its size, survives a kill, and a bad batch is one."""

import math

import pytest

from turnout.tests.helpers import poison
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny

NAN = math.nan
HUGE = 2.0**7  # what the logits of a batch are multiplied by, so that its gradients overflow at the first scale
SITUATIONS = {
    "plain": [],
    "accumulation": ["train.micro_batch=1"],
    "full": ["train.recompute=full"],
    "selective": ["train.recompute=selective"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def half(data, *words):
    return tiny(data, "moe=gshard", "train.dtype=float16", *words)


def assert_same_course(directory, expected):
    """Close to float32; a balance loss that is not scaled with the rest is far off."""
    for found, wanted in zip(rows(directory), rows(expected), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-3)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-2)
    assert {row["loss_scale"] for row in rows(directory)} == {2.0**16}
    assert not any("loss_scale" in row for row in rows(expected))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_it_trains_as_float32_does(data, tmp_path, situation):
    words = ["moe.balance_loss=1.0", "train.steps=4", *SITUATIONS[situation]]
    poison.train(str(tmp_path / "half"), half(data, *words), {})
    poison.train(str(tmp_path / "single"), half(data, *words, "train.dtype=float32"), {})
    assert_same_course(tmp_path / "half", tmp_path / "single")


def test_two_ranks_train_as_float32_does(data, tmp_path):
    words = ["moe.balance_loss=1.0", "train.steps=4", "parallel.ep=2", "train.recompute=full", "train.micro_batch=1"]
    run_ranks(poison.train, 2, str(tmp_path / "half"), half(data, *words), {})
    poison.train(str(tmp_path / "single"), tiny(data, "moe=gshard", *words[:2], "train.dtype=float32"), {})
    assert_same_course(tmp_path / "half", tmp_path / "single")


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.ep=2",
        "parallel.fsdp=true",
        pytest.param("parallel.ep=1", marks=pytest.mark.full),
        pytest.param("parallel.pp=2", marks=pytest.mark.full),
    ],
)
def test_an_overflow_lowers_the_scale_on_every_rank_and_costs_no_batch(data, tmp_path, layout):
    words = half(data, layout, "train.micro_batch=2", "train.steps=4", "optim.clip=0.1")
    assert run_ranks(poison.train, 2, str(tmp_path / "half"), words, {2: HUGE}) == ["done", "done"]
    poison.train(str(tmp_path / "single"), half(data, *words[-2:], "train.dtype=float32"), {})
    scales = [row["loss_scale"] for row in rows(tmp_path / "half")]
    assert scales[:2] == [2.0**16] * 2
    assert scales[2] == scales[3] <= 2.0**15
    assert not rows(tmp_path / "half", "skip")
    ours, theirs = rows(tmp_path / "half"), rows(tmp_path / "single")
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    assert ours[2]["loss"] > theirs[2]["loss"] + 1, "the third batch is the loud one, once"
    for step in (0, 1, 3):
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], abs=0.05)


@pytest.mark.parametrize("kill_after", [3, 5, 8])
def test_a_killed_run_resumes_its_scale_to_the_same_bits(data, tmp_path, kill_after):
    words, loud = half(data, "train.steps=8"), {3: HUGE}
    assert poison.train(str(tmp_path / "whole"), words, loud, grow_after=3) == "done"
    assert poison.train(str(tmp_path / "parts"), words, loud, kill_after=kill_after, grow_after=3) == "killed"
    assert poison.train(str(tmp_path / "parts"), [*words, "train.resume=true"], loud, grow_after=3) == "done"
    scales = [[row["loss_scale"] for row in rows(tmp_path / name)] for name in ("whole", "parts")]
    assert scales[0] == scales[1]
    assert len(set(scales[0])) > 2, "it must rise and fall"
    assert fingerprint(tmp_path / "whole", 8) == fingerprint(tmp_path / "parts", 8)


def test_a_batch_that_is_broken_at_every_scale_is_skipped_as_one(data, tmp_path):
    words = half(data, "parallel.ep=2", "train.skip_nonfinite=1", "train.steps=4")
    assert run_ranks(poison.train, 2, str(tmp_path / "run"), words, {2: NAN}) == ["done", "done"]
    assert rows(tmp_path / "run", "skip") == [{"kind": "skip", "step": 3, "epoch": 0, "row": 8, "in_a_row": 1}]
    assert [row["loss_scale"] for row in rows(tmp_path / "run")] == [2.0**16] * 4
    assert "is not finite" in poison.train(str(tmp_path / "stops"), half(data), {2: NAN})
