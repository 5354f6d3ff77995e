"""The mixed workload: what is asked is what is generated, in every way of serving, and the numbers add up."""

import json
from dataclasses import replace

import pytest

from turnout.inference.config import EngineConfig
from turnout.inference.engine import Engine
from turnout.launch.workload import Job, compare, measure, mixed, read
from turnout.tests.inference.conftest import byte_level, model, model_dir  # noqa: F401  (fixtures)

SMALL = EngineConfig(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)


def jobs(arrivals: float = 0.0) -> list[Job]:
    prompts = [tuple(range(1 + i, 1 + i + size)) for i, size in enumerate((5, 40, 17, 3, 60, 16, 33, 9))]
    return [Job(prompt=prompt, tokens=4 + 3 * i, arrival=i * arrivals) for i, prompt in enumerate(prompts)]


def test_the_default_is_the_workload_that_peers_were_measured_with(tmp_path):
    found = mixed(list(range(5000)))
    prompts, outputs = [len(job.prompt) for job in found], [job.tokens for job in found]
    assert (len(found), sum(prompts), min(prompts), max(prompts)) == (64, 6572, 17, 406)
    assert (sum(outputs), min(outputs), max(outputs)) == (3591, 14, 192)
    assert all(job.prompt == tuple(range(job.prompt[0], job.prompt[0] + len(job.prompt))) for job in found)
    assert found == mixed(list(range(5000))) != mixed(list(range(5000)), seed=8)
    requests = [{"prompt_ids": job.prompt, "out": job.tokens} for job in found]
    path = tmp_path / "workload.json"
    path.write_text(json.dumps({"requests": requests, "arrivals_unit": [job.arrival for job in found]}))
    assert read(path) == found


def test_ways_are_compared_on_one_model(model_dir):  # noqa: F811
    ways = [
        replace(SMALL, batching=batching, kv_layout=layout)
        for batching in ("continuous", "static", "dynamic")
        for layout in ("paged", "contiguous")
    ]
    found = compare(model_dir, jobs(), ways)
    assert {(report.requests, report.output_tokens) for report in found} == {(8, sum(job.tokens for job in jobs()))}
    for report in found:
        assert 0 < report.ttft_p50 <= report.ttft_p99 <= report.seconds
        assert 0 < report.tpot_p50 <= report.tpot_p99
        assert 0 < report.scheduler_seconds * report.steps < report.seconds
        assert 0 < report.scheduler_share < 1
        assert report.output_tokens_per_second == report.output_tokens / report.seconds
    continuous, static = found[0], found[2]
    assert continuous.steps < static.steps, "a seat that is free is taken at once"
    for paged, contiguous in zip(found[::2], found[1::2], strict=True):
        assert paged.kv_utilisation > 2 * contiguous.kv_utilisation > 0
        assert contiguous.preemptions == 0


def test_preemptions_are_those_of_the_workload(model, byte_level):  # noqa: F811
    engine = Engine(model, byte_level, replace(SMALL, num_blocks=9))
    first, second = measure(engine, jobs()), measure(engine, jobs())
    assert engine.stats().preemptions == first.preemptions + second.preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_that_arrive_later_wait_from_their_arrival(model, byte_level, overlap):  # noqa: F811
    engine = Engine(model, byte_level, replace(SMALL, overlap=overlap))
    report = measure(engine, jobs(arrivals=1.0), rate=10)
    assert report.seconds > 0.7, "the last one arrives then"
    assert report.ttft_p50 < 0.5
    assert "schedule" not in vars(engine.scheduler), "the stopwatch is off again"
