"""From bind to exit: loading, full queue, draining, crash."""
# ruff: noqa: N802 (G3 is the name of a rule)

import asyncio
import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from turnout import ConfigError
from turnout.inference.errors import EngineStoppedError
from turnout.inference.server.config import ServerConfig
from turnout.inference.server.lifecycle import Server, bind
from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, SLOW, Running, run_server

LONG = {"prompt": "The list", "max_tokens": 100, "ignore_eos": True}


def raw_stream(served: Running, **body) -> str:
    """The whole text of an event stream, however it ends."""
    text = ""
    ask = served.http.stream("POST", "/v1/completions", json={"model": NAME, "stream": True} | LONG | body)
    with ask as answer, contextlib.suppress(httpx.RemoteProtocolError):  # a connection that was cut
        for part in answer.iter_text():
            text += part
    return text


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as executor:
        yield executor


def test_G4_while_it_loads_the_port_answers_503(model, byte_level):
    def loaders() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("turnout-load")]

    loading = threading.Event()
    with run_server(model, byte_level, {}, loading=loading) as served:
        try:
            assert eventually(lambda: served.get("/health").json() == {"status": "loading"})
            assert served.get("/health").status_code == served.get("/ready").status_code == 503
            answer = served.post(prompt="x")
            assert answer.status_code == 503
            assert len(loaders()) == 1
            assert int(answer.headers["retry-after"]) > 0
            assert served.get("/v1/models").status_code == served.get("/metrics").status_code == 200
        finally:
            loading.set()
        assert eventually(lambda: served.get("/ready").status_code == 200)
        assert loaders() == [], "its OpenMP workers would be too many"
        assert served.get("/health").json() == {"status": "ready"}
        assert served.post(prompt="x").status_code == 200


def test_P10_a_full_queue_is_429_with_retry_after(serve, pool):
    served = serve(max_num_seqs=1, max_waiting=1)
    served.engine.pace = SLOW
    first = pool.submit(served.post, **LONG)
    assert eventually(lambda: served.engine.stats().running == 1)
    second = pool.submit(served.post, **LONG)
    assert eventually(lambda: served.engine.stats().waiting == 1)
    answer = served.post(**LONG)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "queue_full"
    with pytest.raises(openai.RateLimitError):
        served.client().completions.create(model=NAME, stream=True, prompt="The list")
    served.engine.pace = 0.0
    assert [future.result().json()["usage"]["completion_tokens"] for future in (first, second)] == [100, 100]


def test_P10_waiting_too_long_is_503(serve, pool):
    served = serve(max_num_seqs=1, queue_timeout=1.0)
    served.engine.pace = SLOW
    first = pool.submit(served.post, **LONG)
    assert eventually(lambda: served.engine.stats().running == 1)
    answer = served.post(**LONG)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "queue_timeout"
    served.engine.pace = 0.0
    assert first.result().status_code == 200


def test_G5_comments_keep_a_silent_stream_alive(serve, pool):
    served = serve(server={"keepalive_seconds": 0.02}, max_num_seqs=1)
    served.engine.pace = SLOW
    first = pool.submit(served.post, **LONG)
    assert eventually(lambda: served.engine.stats().running == 1)
    body = {"model": NAME, "stream": True} | LONG | {"max_tokens": 3}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        texts = answer.iter_text()
        begin = next(texts)
        served.engine.pace = 0.0
        frames = (begin + "".join(texts)).split("\n\n")
    assert frames[0] == ": keep-alive"
    assert frames[-2:] == ["data: [DONE]", ""]
    assert sum(frame.startswith("data: {") for frame in frames) >= 1
    assert all(frame.startswith(("data: ", ": ")) for frame in frames[:-1])
    assert first.result().status_code == 200


def test_G3_stopping_finishes_what_runs_and_refuses_what_comes(serve, pool):
    served = serve()
    served.engine.pace = SLOW
    stream = pool.submit(raw_stream, served)
    whole = pool.submit(served.post, **LONG)
    assert eventually(lambda: served.engine.stats().running == 2)
    served.engine.gate.clear()
    served.stop()
    assert eventually(lambda: served.get("/ready").status_code == 503)
    assert served.get("/health").json() == {"status": "shutting down"}
    answer = served.post(prompt="x")
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    served.engine.pace = 0.0
    served.engine.gate.set()
    assert whole.result().json()["usage"]["completion_tokens"] == 100
    *_, last, done, end = stream.result().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert served.ended.result(30) is None
    with pytest.raises(httpx.TransportError):
        served.get("/health")


def test_G3_what_outlasts_the_drain_ends_as_abort(serve, pool):
    served = serve(server={"drain_seconds": 0.05})
    served.engine.pace = SLOW
    stream, whole = pool.submit(raw_stream, served), pool.submit(served.post, **LONG)
    assert eventually(lambda: served.engine.stats().running == 2)
    served.stop()
    *_, last, done, _ = stream.result().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
    assert done == "data: [DONE]"
    assert whole.result().json()["choices"][0]["finish_reason"] == "abort"
    assert whole.result().json()["usage"]["completion_tokens"] < 100
    assert served.ended.result(30) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_G3_a_crash_fails_what_runs_and_ends_the_server_with_its_cause(serve, pool):
    served = serve()
    served.engine.pace = SLOW
    stream, whole = pool.submit(raw_stream, served), pool.submit(served.post, **LONG)
    assert eventually(lambda: served.engine.stats().running == 2)
    served.engine.crash = RuntimeError("no such kernel: /secret/path")
    assert whole.result().status_code == 503
    assert "secret" not in whole.result().text
    *_, last, end = stream.result().split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert "[DONE]" not in stream.result()
    error = served.ended.exception(30)
    assert isinstance(error, EngineStoppedError)
    assert "no such kernel" in str(error)


def test_logits_that_are_not_finite_fail_the_request_and_never_give_200(serve, make_model):
    model = make_model()
    served = serve(of=model)
    served.engine.pace = SLOW
    body = {"model": NAME, "stream": True} | LONG
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        frames = answer.iter_lines()
        assert next(frames).startswith("data: ")
        served.engine.gate.clear()
        with torch.no_grad():
            model.head.weight.fill_(torch.nan)
        served.engine.pace = 0.0
        served.engine.gate.set()
        text = [line for line in frames if line]
    assert "error" in json.loads(text[-1].removeprefix("data: "))
    assert served.post(**LONG).status_code == 500
    assert served.post(stream=True, **LONG).status_code == 500
    assert eventually(served.idle)


def test_an_error_while_loading_ends_the_server_with_that_error():
    def load():
        raise ConfigError("max_model_len (9) must not exceed 8")

    listener, url = bind(ServerConfig(port=0))
    with pytest.raises(ConfigError, match="max_model_len"):
        asyncio.run(Server(ServerConfig(), NAME, load).run(listener, lambda: pytest.fail("it was ready")))
    with pytest.raises(httpx.TransportError):
        httpx.get(url + "/health")


def test_G4_a_taken_port_is_a_clear_error_and_two_free_ones_differ():
    first, url = bind(ServerConfig(port=0))
    second, other = bind(ServerConfig(port=0))
    try:
        assert url != other
        port = first.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port \({port}\) is taken on 127.0.0.1: stop the other server or use port=0"
        ):
            bind(ServerConfig(port=port))
    finally:
        first.close()
        second.close()


def test_G4_two_servers_on_one_host_are_two(serve):
    one, other = serve(), serve()
    body = {"prompt": "The list", "max_tokens": 9, "temperature": 0}
    assert one.url != other.url
    assert one.post(**body).json()["choices"] == other.post(**body).json()["choices"]
    one.stop()
    assert one.ended.result(30) is None
    assert other.post(**body).status_code == 200
    assert other.metrics()["requests_total{outcome=ok}"] == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host": "0.0.0.0"}, "host (0.0.0.0) is reachable from other machines and there is no api_key: set api_key"),  # noqa: S104
        ({"host": "example.org"}, "host (example.org)"),
        ({"host": "::"}, "host (::)"),
        ({"port": 65536}, "port (65536) must lie in 0..65535"),
        ({"port": -1}, "port (-1)"),
        ({"api_key": ""}, "api_key"),
        ({"drain_seconds": -1.0}, "drain_seconds (-1.0)"),
        ({"allowed_hosts": ("[model.example",)}, "allowed_hosts ([model.example) must be a name"),
        ({"allowed_hosts": ("abc.de:80",)}, "allowed_hosts (abc.de:80) must be a name"),
        ({"drain_seconds": float("nan")}, "drain_seconds (nan)"),
        ({"max_body_bytes": 0}, "max_body_bytes (0)"),
    ],
    ids=str,
)
def test_settings_that_can_not_work_are_refused(settings, says):
    with pytest.raises(ConfigError) as error:
        ServerConfig(**settings)
    assert says in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key_and_any_host_does_with_one(host):
    assert ServerConfig(host=host).api_key is None
    assert ServerConfig(host="0.0.0.0", api_key="k").host == "0.0.0.0"  # noqa: S104


def test_an_address_that_is_not_ours_is_a_clear_error():
    with pytest.raises(ConfigError, match="can not be bound"):
        bind(ServerConfig(host="192.0.2.1", port=0, api_key="k"))


def test_with_a_key_every_route_but_the_probes_needs_it(serve):
    served = serve(server={"api_key": "open sesame"})
    assert served.get("/health").status_code == served.get("/ready").status_code == 200
    for key in ("", "Bearer wrong", "open sesame", "Bearer open sesame!", "Bearer \xff\xfe"):
        for path in ("/v1/models", "/metrics", "/nothing", "/health/"):
            answer = httpx.get(served.url + path, headers={"Authorization": key.encode("latin-1")})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        served.client(api_key="wrong").completions.create(model=NAME, prompt="x")
    assert served.client(api_key="open sesame").completions.create(model=NAME, prompt="x").usage.completion_tokens == 16
