"""Decode steps in fixed shapes give the tokens and statistics of the shapes they come in, at every bucket's edge."""
# ruff: noqa: N802 (G1 is the name of a rule)

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from turnout import ConfigError
from turnout.inference.config import EngineConfig
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.outputs import RequestOutput
from turnout.inference.run.batch import Batch
from turnout.inference.run.graphs import GraphBuckets

BUCKETS = (2, 4)


@dataclass
class Recorder:
    """Hands every batch on and remembers it as it was."""

    buckets: GraphBuckets
    before: list[Batch] = field(default_factory=list)
    after: list[Batch] = field(default_factory=list)
    places: set[int] = field(default_factory=set)

    def pad(self, batch: Batch) -> Batch:
        padded = self.buckets.pad(batch)
        self.before.append(batch)
        self.after.append(replace(padded, **{k: v.clone() for k, v in vars(padded).items() if isinstance(v, Tensor)}))
        if padded is not batch:
            self.places.add(padded.tokens_T.data_ptr())
        return padded


def complete(engine: Engine, requests: int, tokens: int = 9) -> list[RequestOutput]:
    """Requests that all start in one step, and end one after another."""
    for i in range(requests):
        greedy = SamplingParams(temperature=0, max_tokens=tokens + i, logprobs=2, ignore_eos=True)
        engine.add_request(str(i), list(range(1 + 7 * i, 5 + 8 * i)), greedy)
    last = {}
    while engine.has_unfinished:
        last |= {output.request_id: output for output in engine.step()}
    return [last[str(i)] for i in range(requests)]


def recorded(engine: Engine) -> Recorder:
    recorder = Recorder(engine.runner._buckets)
    engine.runner._buckets = recorder
    return recorder


@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("requests", [1, 2, 3, 4, 5])
def test_G1_below_at_above_a_bucket_and_above_all_of_them_are_eager_steps_results(
    make_model, make_engine, requests, router
):
    model = make_model(router)
    eager, bucketed = make_engine(model), make_engine(model, graph_buckets=BUCKETS)
    recorder = recorded(bucketed)
    expected, found = complete(eager, requests), complete(bucketed, requests)
    for wanted, output in zip(expected, found, strict=True):
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        for a, b in zip(output.outputs[0].logprobs, wanted.outputs[0].logprobs, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    shapes = {}
    for before, after in zip(recorder.before, recorder.after, strict=True):
        count = before.tokens_T.numel()
        if count == len(before.sampling) == before.context_lens_B.numel():
            shapes.setdefault(count, set()).add(after.tokens_T.numel())
        else:
            assert after.valid_T is None, "a prefill runs as it is"
    sizes = {1: {2}, 2: {2}, 3: {4}, 4: {4}, 5: {5}}
    assert shapes == {count: sizes[count] for count in range(1, requests + 1)}
    assert len(recorder.places) == len({min(b for b in BUCKETS if b >= n) for n in range(1, min(requests, 4) + 1)})


@pytest.mark.parametrize("router", ["switch", "gshard", "hash"])
def test_M1_rows_that_fill_up_a_bucket_route_nowhere_and_count_in_no_statistic(make_model, make_engine, router):
    model = make_model(router)
    eager, bucketed = make_engine(model), make_engine(model, graph_buckets=BUCKETS)
    recorder = recorded(bucketed)
    for engine in (eager, bucketed):
        complete(engine, 3)
    assert any(not bool(batch.valid_T.all()) for batch in recorder.after if batch.valid_T is not None)
    one, two = eager.stats(), bucketed.stats()
    assert (one.steps, one.computed_tokens) == (two.steps, two.computed_tokens)
    assert one.routing.counts() == two.routing.counts()
    torch.testing.assert_close(one.routing.sums_LN, two.routing.sums_LN, rtol=1e-6, atol=1e-6)


def test_I9_no_two_tokens_write_one_slot_and_what_fills_up_writes_the_null_block(make_engine):
    engine = make_engine(graph_buckets=(2, 8))
    recorder = recorded(engine)
    complete(engine, 5)
    size, filled = engine.config.block_size, 0
    for batch in recorder.after:
        valid_T = torch.ones_like(batch.tokens_T, dtype=torch.bool) if batch.valid_T is None else batch.valid_T
        real = batch.slots_T[valid_T].tolist()
        assert len(set(real)) == len(real)
        assert min(real) >= size, "block 0 is nobody's"
        if batch.valid_T is not None:
            assert set(batch.slots_T[~valid_T].tolist()) <= set(range(size))
            assert set(batch.context_lens_B[~valid_T].tolist()) <= {1}
            assert not batch.block_tables_BM[~valid_T].any(), "its table is the null block's"
            filled += int((~valid_T).sum())
    assert filled > 20


@pytest.mark.parametrize("buckets", [(), (2, 8)])
def test_I9_what_the_null_block_holds_reaches_no_request(make_engine, buckets):
    engine = make_engine(graph_buckets=buckets, enable_prefix_caching=False)
    clean = [output.outputs[0].token_ids for output in complete(engine, 5)]
    engine.runner.cache.keys[:, 0] = torch.nan
    engine.runner.cache.values[:, 0] = torch.nan
    assert [output.outputs[0].token_ids for output in complete(engine, 5)] == clean


def test_what_can_not_work_is_refused_with_the_reason(t5, byte_level):
    with pytest.raises(ConfigError, match=r"graph_buckets \(1, 2\) can not be captured on CUDA.*sort_by_expert"):
        GraphBuckets((1, 2), 4, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"graph_buckets \(1\) .* encoder"):
        Engine(t5, byte_level, EngineConfig(num_blocks=64, graph_buckets=(1,)))
    for sizes in ((0, 1), (2, 1), (4, 4)):
        with pytest.raises(ConfigError, match=r"graph_buckets .* ascend"):
            EngineConfig(graph_buckets=sizes)


def test_M1_rows_that_fill_up_a_bucket_take_no_slot_of_a_trained_capacity(make_model, make_engine):
    moe = {"eval_capacity_factor": 1.0, "capacity_tokens": 8}
    model = make_model("switch")
    model = make_model("switch", moe=replace(model.cfg.moe, **moe))
    eager, bucketed = (make_engine(model, moe_capacity="trained", graph_buckets=buckets) for buckets in ((), (2, 8)))
    one, two = ([output.outputs[0].token_ids for output in complete(engine, 5, 20)] for engine in (eager, bucketed))
    assert one == two
    assert eager.stats().routing.fields()["drop_fraction"] > 0
    torch.testing.assert_close(eager.stats().routing.sums_LN, bucketed.stats().routing.sums_LN, rtol=1e-6, atol=1e-6)
