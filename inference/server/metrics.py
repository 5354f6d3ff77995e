"""Prometheus metrics under `turnout:`, in a registry of the server's own. Labels have few values, all known here.

What vLLM measures too has the name that it has there, behind another colon, and `model_name`: its dashboards need one
word changed. Totals move as tokens come and are exact: a request's last tokens are counted before its answer is
complete. Histograms of requests hold those that ended by themselves. What the routers did bears the names of training's
`metrics.jsonl`.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..core.gauge import Histogram
from ..outputs import RequestOutput, RequestStats

if TYPE_CHECKING:
    from ...moe.routing.stats import RoutingSnapshot
    from ..stats import EngineStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
LENGTHS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
HISTOGRAMS = {
    "time_to_first_token_seconds": (SECONDS, "From arrival to the first token, seconds."),
    "inter_token_latency_seconds": (PER_TOKEN, "Between two tokens of a choice, every gap, seconds."),
    "request_time_per_output_token_seconds": (PER_TOKEN, "Mean over a request's tokens after the first, seconds."),
    "e2e_request_latency_seconds": (SECONDS, "From arrival to the last token, seconds."),
    "request_queue_time_seconds": (SECONDS, "From the engine's door to its first step, seconds."),
    "request_prefill_time_seconds": (SECONDS, "From its first step to its first token, seconds."),
    "request_decode_time_seconds": (SECONDS, "From its first token to its last, seconds."),
    "request_inference_time_seconds": (SECONDS, "From its first step to its last token, seconds."),
    "request_prompt_tokens": (LENGTHS, "Prompt tokens of a request."),
    "request_generation_tokens": (LENGTHS, "Generated tokens of a choice."),
}
REASONS = ("stop", "length", "abort", "error")
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
    """All metrics of one server. Its event loop counts, and reads them.

    Args:
        stats: the engine's gauges and counters; None while there is no engine.
        model: what `model_name` says in every sample.
    """

    def __init__(self, stats: "Callable[[], EngineStats | None]", model: str = "") -> None:
        own = CollectorRegistry()
        self.registry = _Named(own, model)
        own.register(_EngineCollector(stats))
        self.http = Counter("turnout:http_requests", "HTTP answers.", ("route", "status"), registry=own)
        self.requests = Counter("turnout:requests", "Prompts by how they ended.", ("outcome",), registry=own)
        text = "Choices by why they ended, those that were refused among the errors."
        self.choices = Counter("turnout:request_success", text, ("finished_reason",), registry=own)
        self.prompt_tokens = Counter("turnout:prompt_tokens", "Prompt tokens.", registry=own)
        self.generation_tokens = Counter("turnout:generation_tokens", "Generated tokens.", registry=own)
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in HISTOGRAMS.items()}
        own.register(_Histograms(self.histograms))
        for outcome in ("ok", "abort", "error"):
            self.requests.labels(outcome)
        for reason in REASONS:
            self.choices.labels(reason)

    def refused(self, status: int) -> None:
        """Count an answer to what never became a request."""
        self.http.labels("other", str(status)).inc()

    def watch(self, n: int) -> "Watch":
        """Counts one engine request of n choices from now on."""
        return Watch(self, n)


class Watch:
    """Counts the outputs of one request as they come.

    Attributes:
        arrival, first: when it came and when its first token did, on `time.monotonic`; 0 = not yet.
        stats: when the engine did what.
        outcome: ok, abort or error; empty while it runs.
    """

    def __init__(self, metrics: Metrics, n: int) -> None:
        self.arrival = time.monotonic()
        self.first = 0.0
        self.stats: RequestStats | None = None
        self.outcome = ""
        self._metrics = metrics
        self._gaps = metrics.histograms["inter_token_latency_seconds"]
        self._tokens = [0] * n
        self._newest = [0.0] * n
        """When a choice's last token was there, on the engine's clock."""
        self._prompt_tokens: int | None = None
        self._reasons: dict[int, str] = {}

    def observe(self, output: RequestOutput) -> None:
        """Count what is new in the cumulative `output`."""
        if self._prompt_tokens is None:
            self._prompt_tokens = len(output.prompt_token_ids)
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
        self.stats = output.metrics
        now, before = output.metrics.last_token_ts, sum(self._tokens)
        for choice in output.outputs:
            at = choice.index
            new = len(choice.token_ids) - self._tokens[at]
            if new:
                if self._tokens[at]:
                    self._gaps.add((now - self._newest[at]) / new, new)
                self._tokens[at] += new
                self._newest[at] = now
            if choice.finish_reason is not None and at not in self._reasons:
                self._reasons[at] = choice.finish_reason
        tokens = sum(self._tokens)
        if tokens > before:
            self._metrics.generation_tokens.inc(tokens - before)
            if not before:
                self.first = time.monotonic()
                self._metrics.histograms["time_to_first_token_seconds"].add(self.first - self.arrival)

    def end(self, error: BaseException | None) -> None:
        """Count how it ended; a request that is cancelled counts as aborted."""
        gone = "abort" in self._reasons.values() or isinstance(error, asyncio.CancelledError)
        self.outcome = "abort" if gone else "ok" if error is None else "error"
        self._metrics.requests.labels(self.outcome).inc()
        for reason in self.reasons:
            self._metrics.choices.labels(reason).inc()
        if self.outcome == "ok" and self.stats is not None:
            self._finished(self.stats)

    @property
    def reasons(self) -> list[str]:
        """Why each choice has ended."""
        return [self._reasons.get(choice, self.outcome) for choice in range(len(self._tokens))]

    def _finished(self, stats: RequestStats) -> None:
        seconds = {"e2e_request_latency": time.monotonic() - self.arrival}
        seconds["request_queue_time"] = stats.scheduled_ts - stats.queued_ts
        if stats.first_token_ts:
            seconds["request_prefill_time"] = stats.first_token_ts - stats.scheduled_ts
            seconds["request_decode_time"] = stats.last_token_ts - stats.first_token_ts
            seconds["request_inference_time"] = stats.last_token_ts - stats.scheduled_ts
        if (longest := max(self._tokens)) > 1:
            seconds["request_time_per_output_token"] = seconds["request_decode_time"] / (longest - 1)
        histograms = self._metrics.histograms
        for name, value in seconds.items():
            histograms[f"{name}_seconds"].add(value)
        histograms["request_prompt_tokens"].add(self._prompt_tokens or 0)
        for tokens in self._tokens:
            histograms["request_generation_tokens"].add(tokens)


class _Named(Collector):
    """Another collector's metrics, of which every sample tells the model; so nothing is looked up when one counts."""

    def __init__(self, inner: Collector, model: str) -> None:
        self._inner, self._label = inner, {"model_name": model}

    def collect(self) -> Iterator[Metric]:
        for family in self._inner.collect():
            family.samples = [sample._replace(labels=self._label | sample.labels) for sample in family.samples]
            yield family


class _Histograms(Collector):
    """Histograms that one thread fills and reads."""

    def __init__(self, histograms: Mapping[str, Histogram]) -> None:
        self._histograms = histograms

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for name, histogram in self._histograms.items():
            yield _histogram(name, HISTOGRAMS[name][1], histogram)


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
        yield GaugeMetricFamily("turnout:kv_cache_usage_perc", "Referenced / usable KV blocks, 0 to 1.", stats.usage)
        yield CounterMetricFamily("turnout:num_preemptions", "Requests that lost their blocks.", stats.preemptions)
        yield CounterMetricFamily("turnout:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield CounterMetricFamily("turnout:prefix_cache_hits", "Those that were found.", stats.prefix_hits)
        yield _histogram("iteration_tokens_total", "Tokens that a step computed.", stats.step_tokens)
        text = "What ranks have sent one another for experts."
        yield CounterMetricFamily("turnout:all_to_all_bytes", text, stats.all_to_all_bytes)
        yield from _routing(stats.routing)


def _routing(snapshot: "RoutingSnapshot") -> Iterator[Metric]:
    """Since start: assignments and drops as counters, whose rates are those of now; a gauge for each routing field."""
    fields = snapshot.fields()
    families: list[tuple[Any, Any]] = [
        (GaugeMetricFamily(f"turnout:{name}", f"{text} Since start.", labels=labels), fields[name])
        for name, (labels, text) in ROUTING.items()
    ]
    text = "Assignments to an expert, before drops."
    families.append((CounterMetricFamily("turnout:expert_assignments", text, labels=EXPERT), snapshot.counts()))
    text = "Assignments that went nowhere."
    families.append((CounterMetricFamily("turnout:dropped_assignments", text, labels=LAYER), snapshot.dropped()))
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


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    upto = list(accumulate(histogram.counts))
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, upto, strict=True))
    return HistogramMetricFamily(f"turnout:{name}", text, buckets=buckets, sum_value=histogram.total)
