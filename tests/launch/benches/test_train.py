"""A training step is measured beside others of as many FLOPs, each in a process of its own, in turns."""

import dataclasses
import sys

import pytest

from turnout import PeerError
from turnout.launch.benches import train
from turnout.launch.compose import compose
from turnout.moe.flops import flops_per_token

TINY = ("model=tiny", "data.vocab_size=300", "moe=mixtral", "moe.num_experts=4", "train.seq_len=32")


@pytest.fixture(scope="module")
def small():
    return compose(train.WORDS, world=1).config


def test_the_small_mixture_has_a_dense_twin_of_as_many_flops(small):
    dense = train.twin(small.model)
    assert dense.moe is None
    sparse_flops, dense_flops = (flops_per_token(model, 256) for model in (small.model, dense))
    assert dense_flops == pytest.approx(sparse_flops, rel=0.01)
    assert dataclasses.asdict(train.sizes(small)) == {
        "width": 512, "layers": 8, "heads": 8, "experts": 8, "top_k": 2, "hidden": 1024, "vocabulary": 8192,
        "rows": 8, "length": 256,
    }  # fmt: skip


def test_a_run_is_measured_without_evaluating_saving_or_ending():
    config = train.config_of("")
    assert (config.train.eval_every, config.train.save_every) == (None, None)
    assert config.train.steps == config.log.every == 1_000_000


def test_libraries_that_are_not_installed_have_a_note(small, tmp_path):
    others = train._others(small, train.twin(small.model), tmp_path, tmp_path)
    assert {name: words for name, words in others.items() if isinstance(words, str)} == dict.fromkeys(
        train.PEERS, "not installed"
    )
    assert len(others) == len(train.PEERS) + 3


def test_a_process_that_ends_is_an_error_with_its_last_words(tmp_path):
    words = [sys.executable, "-c", "raise SystemExit('enough')"]
    ended = pytest.raises(PeerError, match=r"(?s)frail ended with code 1.*enough")
    with train._started("frail", words, tmp_path) as one, ended:
        one.step()


@pytest.mark.full
def test_ours_on_two_ranks_its_twin_and_plain_hosts_take_turns():
    config = compose(TINY, world=1).config
    quiet = dataclasses.replace(config.train, steps=10**6, save_every=None)
    config = dataclasses.replace(config, train=quiet, log=dataclasses.replace(config.log, every=10**6))
    rows = train.measure(config, rounds=1, peers=None, nproc=2)
    assert [row["contestant"] for row in rows] == [
        "turnout", "turnout, experts on 2 ranks", "turnout, dense twin", "plain PyTorch, loop", "plain PyTorch, dense",
    ]  # fmt: skip
    assert all(row["tokens_per_second"] > 0 and row["peak_mb"] > 100 for row in rows)
    assert rows[0]["ours / theirs"] == 1
