"""The ways to batch, lay out and overlap change when things are computed, never what comes out."""

import itertools
import random

import pytest

from turnout import ConfigError
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.errors import QueueTimeoutError
from turnout.inference.outputs import FailedOutput

WAYS = [
    {"overlap": overlap, "batching": batching, "kv_layout": layout}
    for overlap, batching, layout in itertools.product(
        (False, True), ("continuous", "static", "dynamic"), ("paged", "contiguous")
    )
]


def work() -> list[tuple[list[int], SamplingParams]]:
    """A dozen requests, some with several choices, all of them seeded."""
    rng = random.Random(1)
    found = []
    for i in range(12):
        params = SamplingParams(max_tokens=rng.randrange(1, 20), n=rng.choice([1, 1, 3]), seed=i)
        found.append(([rng.randrange(1, 321) for _ in range(rng.choice([1, 15, 16, 17, 40]))], params))
    return found


def complete(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[list[int]]]:
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    found = {}
    while engine.has_unfinished:
        found |= {output.request_id: output for output in engine.step() if output.finished}
    return [[choice.token_ids for choice in found[str(i)].outputs] for i in range(len(requests))]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_every_way_gives_the_same_tokens(make_engine, way):
    alone = make_engine(enable_prefix_caching=False, overlap=False)
    expected = [complete(alone, [request])[0] for request in work()]
    engine = make_engine(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64, **way)
    assert complete(engine, work()) == expected


def test_choices_compute_their_prompt_once(make_engine):
    prompt = list(range(1, 40))  # two full blocks and a part
    for caching in (True, False):
        engine = make_engine(enable_prefix_caching=caching)
        assert (
            len({tuple(ids) for ids in complete(engine, [(prompt, SamplingParams(n=4, max_tokens=6, seed=3))])[0]}) == 4
        )
        assert engine.stats().computed_tokens == 39 + 3 + 4 * 5, (
            "the prompt, its last token for each child, the outputs"
        )


def test_a_step_is_planned_while_another_runs(make_engine):
    engine = make_engine(overlap=True)
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))
    engine.step()
    assert len(engine._plans) == 1, "the next step runs already"
    while engine.has_unfinished:
        engine.step()
    assert engine.stats().steps == 8, "no step is wasted on a request whose length is known"


def test_an_abort_while_its_step_runs_ends_it_once_and_frees_it(make_engine):
    engine = make_engine(overlap=True)
    for name in ("a", "b"):
        engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True, seed=1))
    engine.step()
    assert engine.abort("a").outputs[0].finish_reason == "abort"
    seen = []
    while engine.has_unfinished:
        seen += [output.request_id for output in engine.step()]
    assert set(seen) == {"b"}


def test_contiguous_reserves_a_whole_run_and_must_hold_one(make_engine):
    engine = make_engine(kv_layout="contiguous", max_model_len=64, num_blocks=11)
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=2))
    engine.step()
    assert engine.stats().usage == 4 / 8, "two runs of four blocks fit, one is taken"
    engine.abort("a")
    with pytest.raises(ConfigError, match="num_blocks"):
        make_engine(kv_layout="contiguous", max_model_len=64, num_blocks=4)


def test_a_closed_engine_holds_nothing(make_engine):
    engine = make_engine(overlap=True)
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))
    engine.step()
    engine.close()
    assert not engine.has_unfinished


def test_tenants_of_different_salts_share_no_prefix(make_engine):
    engine = make_engine()
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        engine.add_request(name, list(range(1, 40)), SamplingParams(max_tokens=1), cache_salt=salt)
        (output,) = [output for output in engine.step() if output.finished]
        assert output.num_cached_tokens == (32 if name == "c" else 0)


def test_a_request_past_its_deadline_expires_and_a_started_one_does_not(make_engine):
    engine = make_engine(max_num_seqs=1)
    now = 0.0
    engine.scheduler._deadlines._clock = engine._clock = lambda: now
    engine.add_request("a", [1], SamplingParams(max_tokens=4, ignore_eos=True), deadline=5.0)
    engine.add_request("b", [1], SamplingParams(max_tokens=4), deadline=5.0)
    engine.step()
    now = 5.0
    (failed,) = [output for output in engine.step() if isinstance(output, FailedOutput)]
    assert failed.request_id == "b"
    assert isinstance(failed.error, QueueTimeoutError)
    while engine.has_unfinished:
        outputs = engine.step()
    assert outputs[-1].outputs[0].finish_reason == "length"


def test_a_request_that_expired_in_a_launched_step_may_be_aborted_before_its_commit(make_engine):
    engine = make_engine()
    engine.add_request("late", [1], SamplingParams(max_tokens=4), deadline=0.0)
    engine._launch(engine.scheduler.schedule())
    assert engine.abort("late").outputs[0].finish_reason == "abort"
    assert engine.step() == []
