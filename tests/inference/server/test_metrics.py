"""Totals are exact, whatever happened to the requests; labels are few."""
# ruff: noqa: N802 (G6 is the name of a rule)

import math

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from turnout.moe import MoEConfig, RouteContext, VarlenContext
from turnout.moe.routing.stats import RoutingStats
from turnout.moe.train.metrics import Window
from turnout.tests.helpers.waiting import eventually

from .conftest import SLOW, Running


def moved(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0) - before.get(name, 0)


def test_G6_totals_are_those_of_the_answers(served: Running):
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
    assert moved(before, after, "request_time_per_output_token_seconds_count") == 5  # one had a single token
    reasons = [c["finish_reason"] for answer in answers[:-1] for c in answer["choices"]] + ["length"]
    assert "stop" in reasons
    for reason in ("stop", "length", "abort", "error"):
        assert moved(before, after, f"request_success_total{{finished_reason={reason}}}") == reasons.count(reason)
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


def test_G6_preempted_work_is_counted_once(serve):
    served = serve(num_blocks=16, enable_prefix_caching=False, max_num_seqs=8)
    answers = served.post(prompt=[[i] * 20 for i in range(6)], max_tokens=60).json()
    metrics = served.metrics()
    assert metrics["num_preemptions_total"] > 0
    assert metrics["generation_tokens_total"] == answers["usage"]["completion_tokens"] == 360
    assert metrics["prompt_tokens_total"] == 120


def test_G6_gauges_follow_the_load_and_return_to_zero(serve):
    served = serve(max_num_seqs=2)
    served.engine.pace = SLOW
    with served.client().completions.create(
        model="tiny", prompt=["a", "b", "c", "d"], max_tokens=120, stream=True
    ) as chunks:
        next(iter(chunks))
        assert eventually(lambda: served.metrics()["num_requests_running"] == 2)
        assert served.metrics()["num_requests_waiting"] == 2
        assert 0 < served.metrics()["kv_cache_usage_perc"] < 1
    assert eventually(served.idle)
    metrics = served.metrics()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [metrics[name] for name in names] == [0, 0, 0]
    assert metrics["requests_total{outcome=abort}"] == 4


def test_G6_a_request_that_fails_is_an_error_and_not_an_abort(serve):
    served = serve()
    served.post(prompt=[321])
    metrics = served.metrics()
    assert metrics["requests_total{outcome=error}"] == 1
    assert metrics["requests_total{outcome=abort}"] == metrics["requests_total{outcome=ok}"] == 0


def test_G6_strangers_can_not_make_new_labels(serve):
    served = serve()
    for i in range(5):
        served.get(f"/v1/nothing-{i}")
        served.post(model=f"model-{i}", prompt="x")
    found = {name for name in served.metrics() if name.startswith("http_requests_total")}
    assert found == {
        "http_requests_total{route=other,status=404}",
        "http_requests_total{route=/v1/completions,status=404}",
    }


@pytest.mark.parametrize("name", ["prompt_tokens_total", "e2e_request_latency_seconds_count", "num_preemptions_total"])
def test_a_fresh_server_shows_every_total_at_zero(serve, name):
    assert serve().metrics()[name] == 0


def training_row() -> dict:
    """A row of `metrics.jsonl` of the model that is served; empty, for its names."""
    moe = MoEConfig(width=32, expert_width=32, num_experts=4)
    return Window((1, 3), moe, torch.device("cpu")).report(lambda total: total, 1.0, None)


def test_routing_has_the_names_and_the_places_of_training_s_rows(served: Running):
    served.post(prompt="The list", max_tokens=3)
    losses = {"loss", "aux_loss", "aux/balance", "aux/z", "z_loss", "tokens_per_second", "mfu"}
    row = {name: value for name, value in training_row().items() if name not in losses}
    layers = row.pop("moe_layers")
    found = {}
    for family in text_string_to_metric_families(served.get("/metrics").text):
        places = {(sample.labels.get("layer"), sample.labels.get("expert")) for sample in family.samples}
        name = family.name.removeprefix("turnout:")
        if name in row or places - {(None, None)}:
            found[name] = places
    by_layer = {(str(layer), None) for layer in layers}
    by_expert = {(str(layer), str(expert)) for layer in layers for expert in range(4)}
    assert found.keys() - row.keys() == {"expert_assignments", "dropped_assignments"}, "the counters behind them"
    assert found.pop("expert_assignments") == by_expert
    assert found.pop("dropped_assignments") == by_layer
    depth = {name: 0 if not isinstance(value, list) else 1 + isinstance(value[0], list) for name, value in row.items()}
    assert found == {name: [{(None, None)}, by_layer, by_expert][depth[name]] for name in row}


def test_routing_is_that_of_the_tokens_that_were_computed(serve, model):
    served = serve(enable_prefix_caching=False)
    prompt = list(range(3, 40))
    assert served.metrics()["dead_experts{layer=1}"] == 4
    answer = served.post(prompt=prompt, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    ids_T = torch.tensor(prompt)
    context = VarlenContext(torch.tensor([0, len(prompt)]), route=RouteContext(token_ids_T=ids_T, dropless=True))
    with torch.no_grad():
        model(ids_T, torch.arange(len(prompt)), context)
    stats = RoutingStats((1, 3), 4, torch.device("cpu"))
    stats.add(context.routings)
    row, counts, found = stats.fields(), stats.snapshot().counts(), served.metrics()
    for at, layer in enumerate((1, 3)):
        for expert in range(4):
            place = f"{{expert={expert},layer={layer}}}"
            assert found[f"expert_assignments_total{place}"] == counts[at][expert]
            assert found[f"expert_load{place}"] == row["expert_load"][at][expert]
        for name in ("load_max_mean", "load_cv", "router_entropy", "dead_experts", "router_logit_norm"):
            assert found[f"{name}{{layer={layer}}}"] == pytest.approx(row[name][at], rel=1e-4), name
    assert found["drop_fraction"] == 0
    assert found["router_entropy{layer=1}"] <= math.log(4)


def test_routing_can_be_read_while_the_engine_works(serve):
    served = serve(max_num_seqs=4)
    served.engine.pace = SLOW / 10
    seen = []
    with served.client().completions.create(model="tiny", prompt=["a"] * 4, max_tokens=200, stream=True) as chunks:
        next(iter(chunks))
        while not served.idle() and len(seen) < 20:
            found = served.metrics()
            assignments = [found[f"expert_assignments_total{{expert={expert},layer=1}}"] for expert in range(4)]
            loads = [found[f"expert_load{{expert={expert},layer=1}}"] for expert in range(4)]
            assert loads == pytest.approx([count / sum(assignments) for count in assignments]), "of one moment"
            seen.append(sum(assignments))
    assert seen == sorted(seen)
    assert seen[-1] > 4
