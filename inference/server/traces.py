"""A span for every request that reached the engine, sent by OTLP over HTTP where somebody wants it.

Its children are the time in the queue, the prefill and the decode of each prompt. Names and attributes are vLLM's
(`llm_request`, `gen_ai.*`); a W3C `traceparent` is taken over. Nothing is sent, and OpenTelemetry is not imported,
unless an endpoint is set.
"""

import threading
import time
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from ... import ConfigError
from ..outputs import RequestStats
from .logs import Entry
from .requests import request_id

FLUSH_SECONDS = 3.0  # how long the end of a server waits for a collector
CHILDREN = ("queue", "prefill", "decode")


class Traces:
    """A sink of entries. Spans are sent by a thread of its own; a collector that is down costs nobody anything.

    Args:
        endpoint: the collector's URL; one without a path means `/v1/traces`.
        model: the one that is served.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            rule = "needs OpenTelemetry: pip install 'turnout[otel]', or leave it out"
            raise ConfigError(f"otlp_endpoint ({endpoint}) {rule}") from error
        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
        self._provider = TracerProvider(resource=Resource.create({"service.name": "turnout"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=FLUSH_SECONDS)))
        self._tracer = self._provider.get_tracer("turnout")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model
        self._offset = time.time_ns() - time.monotonic_ns()

    def __call__(self, entry: Entry) -> None:
        """Record what an entry tells."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        if entry.generation is None:
            return
        span = self._tracer.start_span(
            "llm_request",
            self._propagator.extract(entry.headers),
            SpanKind.SERVER,
            attributes=self._attributes(entry),
            start_time=self._ns(entry.began),
        )
        inside = set_span_in_context(span)
        for watch in entry.generation.watched:
            moments = [moment for moment in watch.stats or () if moment]
            for name, (start, end) in zip(CHILDREN, pairwise(moments), strict=False):
                self._tracer.start_span(name, inside, start_time=self._ns(start)).end(self._ns(end))
        span.end(self._ns(entry.ended))

    def close(self) -> None:
        """Send what is left, for `FLUSH_SECONDS` at most."""
        ending = threading.Thread(target=self._provider.shutdown, name="turnout-traces", daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)

    def _attributes(self, entry: Entry) -> dict[str, Any]:
        generation = entry.generation
        assert generation is not None, "only such entries have spans"
        usage, params = generation.usage(), generation.params
        found = {
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": request_id.get(),
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
            "gen_ai.usage.completion_tokens": usage["completion_tokens"],
            "gen_ai.latency.e2e": entry.ended - entry.began,
            "gen_ai.latency.time_to_first_token": None if generation.first is None else generation.first - entry.began,
            "gen_ai.response.finish_reasons": generation.reasons,
            "http.request.method": entry.method,
            "http.response.status_code": entry.status,
            "url.path": entry.path,
        }
        found |= _latencies([watch.stats for watch in generation.watched if watch.stats is not None])
        return {name: value for name, value in found.items() if value is not None}

    def _ns(self, moment: float) -> int:
        """A time on `time.monotonic` as the clock on the wall has it."""
        return int(moment * 1e9) + self._offset


def _latencies(found: list[RequestStats]) -> dict[str, float]:
    """The longest of each phase over the prompts, in seconds."""
    done = [stats for stats in found if stats.first_token_ts]
    if not done:
        return {}
    return {
        "gen_ai.latency.time_in_queue": max(s.scheduled_ts - s.queued_ts for s in done),
        "gen_ai.latency.time_in_model_prefill": max(s.first_token_ts - s.scheduled_ts for s in done),
        "gen_ai.latency.time_in_model_decode": max(s.last_token_ts - s.first_token_ts for s in done),
        "gen_ai.latency.time_in_model_inference": max(s.last_token_ts - s.scheduled_ts for s in done),
    }
