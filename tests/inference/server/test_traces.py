"""Spans as a collector gets them, over real HTTP; and nothing at all unless one is named."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from turnout import ConfigError
from turnout.inference.server.config import ServerConfig

from .conftest import NAME

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "xyzzy"  # noqa: S105  (a prompt)


class Collector:
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list:
        found = []
        for path, body in self.requests:
            assert path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def attributes(span) -> dict:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_request_is_a_span_with_its_phases_in_the_caller_s_trace(serve, collector):
    served = serve(server={"otlp_endpoint": collector.url})
    before = time.time_ns()
    body = {"model": NAME, "prompt": SECRET, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "ignore_eos": True}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine-1"}
    usage = served.http.post("/v1/completions", json=body, headers=headers).json()["usage"]
    served.post(prompt=["a", "b"], max_tokens=2, ignore_eos=True)
    served.get("/v1/models")
    served.stop()
    assert served.ended.result(30) is None
    spans = collector.spans()
    mine = [span for span in spans if span.trace_id.hex() == TRACE]
    (whole,) = (span for span in mine if span.name == "llm_request")
    assert whole.parent_span_id.hex() == PARENT
    told = attributes(whole)
    assert (told["gen_ai.request.id"], told["gen_ai.response.model"]) == ("mine-1", NAME)
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.temperature"]) == (5, 0.5)
    assert told["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.completion_tokens"] == usage["completion_tokens"] == 5
    assert told["http.response.status_code"] == 200
    assert 0 < told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"]
    children = [span for span in mine if span.parent_span_id == whole.span_id]
    assert [span.name for span in children] == ["queue", "prefill", "decode"]
    assert before <= whole.start_time_unix_nano <= children[0].start_time_unix_nano
    for one, other in pairwise(children):
        assert one.start_time_unix_nano <= one.end_time_unix_nano == other.start_time_unix_nano
    assert children[-1].end_time_unix_nano <= whole.end_time_unix_nano <= time.time_ns()
    others = [span for span in spans if span.trace_id.hex() != TRACE]
    assert sorted(span.name for span in others) == ["decode"] * 2 + ["llm_request"] + ["prefill"] * 2 + ["queue"] * 2
    assert all(SECRET.encode() not in body for _, body in collector.requests)


def test_nothing_is_sent_unless_an_endpoint_is_set(serve, collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    served = serve()
    assert served.post(prompt="The list", max_tokens=2).status_code == 200
    served.stop()
    assert served.ended.result(30) is None
    assert collector.requests == []


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://", ""])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        ServerConfig(otlp_endpoint=endpoint)
