"""`parallel.fsdp=true` in runs: on two ranks the same bits as without, so a run may change over at any checkpoint."""

import pytest

from turnout.tests.helpers.runs import corpus, fingerprint, run, tiny

FLAT = ("optim.warmup=0", "optim.final=1")  # the rate does not depend on how long the run is


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data"))


def train(data, directory, *words):
    ended = run(
        "-m", "turnout", "train", *tiny(data, f"run={directory}", "nproc=2", "train.save_every=null", *FLAT, *words)
    )
    assert ended.returncode == 0, ended.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        ("optim=adamw", "train.dtype=bfloat16", "parallel.ep=2"),
        ("optim=muon", "train.dtype=float32", "optim.state_dtype=bfloat16"),
        ("optim=adafactor", "train.dtype=float32", "train.recompute=full"),
    ],
    ids=lambda words: words[0].removeprefix("optim="),
)
def test_a_run_that_changes_over_twice_ends_in_the_bits_of_one_that_never_divides(data, tmp_path, words):
    train(data, tmp_path / "never", "train.steps=6", *words)
    for steps, fsdp in ((2, True), (4, False), (6, True)):
        again = ("train.resume=true", f"train.steps={steps}", f"parallel.fsdp={fsdp}")
        train(data, tmp_path / "changing", *again, *words)
    assert fingerprint(tmp_path / "changing", 6) == fingerprint(tmp_path / "never", 6)
