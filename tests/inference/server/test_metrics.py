"""Totals are exact, whatever happened to the requests; labels are few."""

import pytest

from .conftest import Running, eventually


def moved(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0) - before.get(name, 0)


def test_totals_are_those_of_the_answers(served: Running):
    before = served.metrics()
    answers = [
        served.post(prompt=["The list", "naïve"], n=2, max_tokens=7, seed=1).json(),
        served.post(prompt="The import", max_tokens=1).json(),
        served.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=9).json(),
        served.post(prompt="The list", max_tokens=60, stop=["e", "a", "s", "t"], n=4, seed=2).json(),
    ]
    stream = served.stream(prompt="The list", max_tokens=5, stream_options={"include_usage": True})
    answers.append(stream[-2])
    served.post(prompt="", max_tokens=5)
    after = served.metrics()
    usage = [answer["usage"] for answer in answers]
    assert moved(before, after, "prompt_tokens_total") == sum(u["prompt_tokens"] for u in usage)
    assert moved(before, after, "generation_tokens_total") == sum(u["completion_tokens"] for u in usage)
    assert moved(before, after, "requests_total{outcome=ok}") == 6
    assert moved(before, after, "time_to_first_token_seconds_count") == 6
    assert moved(before, after, "e2e_request_latency_seconds_count") == 6
    assert moved(before, after, "time_per_output_token_seconds_count") == 5  # one had a single token
    reasons = [c["finish_reason"] for answer in answers[:-1] for c in answer["choices"]] + ["length"]
    assert "stop" in reasons
    for reason in ("stop", "length", "abort"):
        assert moved(before, after, f"choices_total{{finish_reason={reason}}}") == reasons.count(reason)
    assert moved(before, after, "http_requests_total{route=/v1/completions,status=200}") == 4
    assert moved(before, after, "http_requests_total{route=/v1/completions,status=400}") == 1
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usage)
    assert moved(before, after, "prefix_cache_hits_total") >= cached  # counted for every choice


def test_prefix_hits_are_those_that_usage_reports(serve):
    served = serve()
    prompt = list(range(100))
    cached = [
        served.post(prompt=prompt, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(3)
    ]
    assert cached == [0, 96, 96]
    assert served.metrics()["prefix_cache_hits_total"] == 192
    assert served.metrics()["prefix_cache_queries_total"] == 300


def test_preempted_work_is_counted_once(serve):
    served = serve(num_blocks=16, enable_prefix_caching=False, max_num_seqs=8)
    answers = served.post(prompt=[[i] * 20 for i in range(6)], max_tokens=60).json()
    metrics = served.metrics()
    assert metrics["preemptions_total"] > 0
    assert metrics["generation_tokens_total"] == answers["usage"]["completion_tokens"] == 360
    assert metrics["prompt_tokens_total"] == 120


def test_gauges_follow_the_load_and_return_to_zero(serve):
    served = serve(max_num_seqs=2)
    served.engine.pace = 0.01
    with served.client().completions.create(
        model="tiny", prompt=["a", "b", "c", "d"], max_tokens=120, stream=True
    ) as chunks:
        next(iter(chunks))
        assert eventually(lambda: served.metrics()["num_requests_running"] == 2)
        assert served.metrics()["num_requests_waiting"] == 2
        assert 0 < served.metrics()["kv_cache_usage"] < 1
    assert eventually(served.idle)
    metrics = served.metrics()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage")
    assert [metrics[name] for name in names] == [0, 0, 0]
    assert metrics["requests_total{outcome=abort}"] == 4


def test_a_request_that_fails_is_an_error_and_not_an_abort(serve):
    served = serve()
    served.post(prompt=[321])
    metrics = served.metrics()
    assert metrics["requests_total{outcome=error}"] == 1
    assert metrics["requests_total{outcome=abort}"] == metrics["requests_total{outcome=ok}"] == 0


def test_strangers_can_not_make_new_labels(serve):
    served = serve()
    for i in range(5):
        served.get(f"/v1/nothing-{i}")
        served.post(model=f"model-{i}", prompt="x")
    found = {name for name in served.metrics() if name.startswith("http_requests_total")}
    assert found == {
        "http_requests_total{route=other,status=404}",
        "http_requests_total{route=/v1/completions,status=404}",
    }


@pytest.mark.parametrize("name", ["prompt_tokens_total", "e2e_request_latency_seconds_count", "preemptions_total"])
def test_a_fresh_server_shows_every_total_at_zero(serve, name):
    assert serve().metrics()[name] == 0
