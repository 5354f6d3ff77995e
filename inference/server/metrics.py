"""Prometheus metrics under `turnout:`, in a registry of the server's own. Labels have few values, all known here.

Totals move as tokens come and are exact: a request's last tokens are counted before its answer is complete. What the
routers did bears the names of training's `metrics.jsonl`.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..outputs import RequestOutput

if TYPE_CHECKING:
    from ...moe.routing.stats import RoutingSnapshot
    from ..engine import EngineStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
LAYER, EXPERT = ("layer",), ("layer", "expert")
ROUTING = {
    "expert_load": (EXPERT, "Share of a layer's assignments, before drops."),
    "load_max_mean": (LAYER, "The busiest expert's load over the mean: 1 is balance."),
    "load_cv": (LAYER, "Standard deviation of the load over its mean: 0 is balance."),
    "router_entropy": (LAYER, "Of the router's distribution, mean over tokens, nats."),
    "dead_experts": (LAYER, "Experts without an assignment."),
    "drop_fraction": ((), "Dropped assignments / (tokens * k), mean over layers."),
    "layer_drop_fraction": (LAYER, "Dropped assignments / (tokens * k)."),
    "router_logit_norm": (LAYER, "Norm of a token's router logits, mean over tokens."),
}


class Metrics:
    """All metrics of one server.

    Args:
        stats: the engine's gauges and counters; None while there is no engine.
    """

    def __init__(self, stats: "Callable[[], EngineStats | None]") -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats))
        own = self.registry
        self.http = Counter("turnout:http_requests", "HTTP answers.", ("route", "status"), registry=own)
        self.requests = Counter("turnout:requests", "Prompts by how they ended.", ("outcome",), registry=own)
        self.choices = Counter("turnout:choices", "Choices by finish reason.", ("finish_reason",), registry=own)
        self.prompt_tokens = Counter("turnout:prompt_tokens", "Prompt tokens.", registry=own)
        self.generation_tokens = Counter("turnout:generation_tokens", "Generated tokens.", registry=own)
        self.first_token = _seconds("time_to_first_token", "From arrival to the first token.", SECONDS, own)
        self.per_token = _seconds("time_per_output_token", "Per token after the first.", PER_TOKEN, own)
        self.latency = _seconds("e2e_request_latency", "From arrival to the last token.", SECONDS, own)
        for outcome in ("ok", "abort", "error"):
            self.requests.labels(outcome)
        for reason in ("stop", "length", "abort"):
            self.choices.labels(reason)

    def watch(self) -> "Watch":
        """Counts one engine request from now on."""
        return Watch(self)


class Watch:
    """Counts the outputs of one request as they come."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = time.perf_counter()
        self._first = 0.0
        self._tokens = 0
        self._prompt_counted = False
        self._reasons: dict[int, str] = {}

    def observe(self, output: RequestOutput) -> None:
        """Count what is new in the cumulative `output`."""
        if not self._prompt_counted:
            self._prompt_counted = True
            self._metrics.prompt_tokens.inc(len(output.prompt_token_ids))
        tokens = 0
        for choice in output.outputs:
            tokens += len(choice.token_ids)
            if choice.finish_reason is not None and choice.index not in self._reasons:
                self._reasons[choice.index] = choice.finish_reason
                self._metrics.choices.labels(choice.finish_reason).inc()
        if tokens and not self._tokens:
            self._first = time.perf_counter()
            self._metrics.first_token.observe(self._first - self._arrival)
        self._metrics.generation_tokens.inc(max(0, tokens - self._tokens))
        self._tokens = max(tokens, self._tokens)
        if output.finished:
            now = time.perf_counter()
            self._metrics.latency.observe(now - self._arrival)
            longest = max(len(choice.token_ids) for choice in output.outputs)
            if longest > 1:
                self._metrics.per_token.observe((now - self._first) / (longest - 1))

    def end(self, error: BaseException | None) -> None:
        """Count how it ended; a request that is cancelled counts as aborted."""
        gone = "abort" in self._reasons.values() or isinstance(error, asyncio.CancelledError)
        self._metrics.requests.labels("abort" if gone else "ok" if error is None else "error").inc()


class _EngineCollector(Collector):
    """Asks the engine when Prometheus asks us."""

    def __init__(self, stats: "Callable[[], EngineStats | None]") -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        yield GaugeMetricFamily("turnout:num_requests_running", "Requests with KV blocks.", stats.running)
        yield GaugeMetricFamily("turnout:num_requests_waiting", "Queued requests.", stats.waiting)
        yield GaugeMetricFamily("turnout:kv_cache_usage", "Referenced / usable KV blocks, 0 to 1.", stats.usage)
        yield CounterMetricFamily("turnout:preemptions", "Requests that lost their blocks.", stats.preemptions)
        yield CounterMetricFamily("turnout:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield CounterMetricFamily("turnout:prefix_cache_hits", "Those that were found.", stats.prefix_hits)
        yield from _routing(stats.routing)


def _routing(snapshot: "RoutingSnapshot") -> Iterator[Metric]:
    """Since start: the assignments as a counter, whose rate is the load of now, and a gauge for each routing field."""
    fields = snapshot.fields()
    families: list[tuple[Any, Any]] = [
        (GaugeMetricFamily(f"turnout:{name}", f"{text} Since start.", labels=labels), fields[name])
        for name, (labels, text) in ROUTING.items()
    ]
    text = "Assignments to an expert, before drops."
    families.append((CounterMetricFamily("turnout:expert_assignments", text, labels=EXPERT), snapshot.counts()))
    for family, value in families:
        for labels, number in _samples(fields["moe_layers"], value):
            family.add_metric(labels, number)
        yield family


def _samples(layers: Sequence[int], value: Any) -> Iterator[tuple[tuple[str, ...], float]]:
    """Labels → number, of one number, a list by layer, or one by layer and expert."""
    if not isinstance(value, list):
        yield (), value
        return
    for layer, entry in zip(layers, value, strict=True):
        if isinstance(entry, list):
            yield from (((str(layer), str(expert)), number) for expert, number in enumerate(entry))
        else:
            yield (str(layer),), entry


def _seconds(name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"turnout:{name}_seconds", f"{text} Seconds.", buckets=buckets, registry=registry)
