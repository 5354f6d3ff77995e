"""Prometheus metrics under `turnout:`, in a registry of the server's own. Labels have few values, all known here.

Totals move as tokens come and are exact: a request's last tokens are counted before its answer is complete.
"""

import asyncio
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.scheduler import SchedulerStats
from ..outputs import RequestOutput

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Metrics:
    """All metrics of one server.

    Args:
        stats: the engine's gauges and counters; None while there is no engine.
    """

    def __init__(self, stats: Callable[[], SchedulerStats | None]) -> None:
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
        now = time.perf_counter()
        if not self._prompt_counted:
            self._prompt_counted = True
            self._metrics.prompt_tokens.inc(len(output.prompt_token_ids))
        tokens = sum(len(choice.token_ids) for choice in output.outputs)
        if tokens and not self._tokens:
            self._first = now
            self._metrics.first_token.observe(now - self._arrival)
        self._metrics.generation_tokens.inc(max(0, tokens - self._tokens))
        self._tokens = max(tokens, self._tokens)
        for choice in output.outputs:
            if choice.finish_reason is not None and choice.index not in self._reasons:
                self._reasons[choice.index] = choice.finish_reason
                self._metrics.choices.labels(choice.finish_reason).inc()
        if output.finished:
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

    def __init__(self, stats: Callable[[], SchedulerStats | None]) -> None:
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


def _seconds(name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"turnout:{name}_seconds", f"{text} Seconds.", buckets=buckets, registry=registry)
