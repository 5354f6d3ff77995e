"""One line a request, and what it may not tell."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from turnout.inference.server.logs import LineFormatter, logger
from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, SLOW, Running
from .test_abort import open_call, read_until

SECRET = "xyzzy"  # noqa: S105  (a prompt)


class Lines(logging.Handler):
    """Keeps what is written, in one form."""

    def __init__(self, form: str) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(LineFormatter(form))
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    def find(self, **fields: object) -> dict:
        """The one line about requests that says so."""
        lines = [json.loads(text) for text in self.texts]
        found = [line for line in lines if line["message"] == "request" and fields.items() <= line.items()]
        assert len(found) == 1, self.texts
        return found[0]


@pytest.fixture
def lines(request) -> Iterator[Lines]:
    handler = Lines(getattr(request, "param", "json"))
    root = logging.getLogger()
    before = logger.level
    root.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(before)
    root.removeHandler(handler)


def ended(served: Running, lines: Lines, count: int) -> bool:
    return eventually(lambda: sum('"request"' in text for text in lines.texts) >= count and served.idle())


def test_a_request_s_line_tells_what_its_client_saw(served: Running, lines):
    headers = {"X-Request-Id": "mine-1"}
    body = {"model": NAME, "prompt": ["The list", SECRET], "max_tokens": 5, "n": 2, "ignore_eos": True}
    answer = served.http.post("/v1/completions", json=body, headers=headers)
    assert ended(served, lines, 1)
    line = lines.find(request_id="mine-1")
    usage = answer.json()["usage"]
    told = {"method": "POST", "path": "/v1/completions", "status": 200, "level": "info"}
    told |= {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"]}
    assert told.items() <= line.items()
    assert line["finish_reason"] == "length,length,length,length"
    assert 0 < line["ttft_seconds"] <= line["total_seconds"]
    assert SECRET not in "".join(lines.texts)
    assert answer.json()["choices"][0]["text"] not in "".join(lines.texts)


def test_streams_refusals_and_clients_that_leave_have_their_lines_too(serve, lines):
    served = serve()
    served.stream(prompt="The list", max_tokens=4, ignore_eos=True)
    served.post(prompt=[321])
    served.get("/v1/nothing%0Aforged?key=secret")
    served.engine.pace = SLOW
    client = open_call(served, stream=True)
    read_until(client, b"data: ")
    client.close()
    assert ended(served, lines, 4)
    stream, refused, unknown, left = (json.loads(text) for text in lines.texts if '"request"' in text)
    assert (stream["completion_tokens"], stream["finish_reason"]) == (4, "length")
    assert (refused["status"], refused["finish_reason"], refused["completion_tokens"]) == (400, "error", 0)
    assert "ttft_seconds" not in refused
    assert (unknown["status"], unknown["path"]) == (400, "/v1/nothing%0Aforged")
    assert (left["status"], left["finish_reason"]) == (200, "abort")
    assert len({line["request_id"] for line in (stream, refused, unknown, left)}) == 4


def test_probes_are_quiet_while_all_is_well(served: Running, lines):
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        served.get(path)
    assert ended(served, lines, 1)
    assert [json.loads(text)["path"] for text in lines.texts] == ["/v1/models"]


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_a_line_of_text_can_not_be_forged(served: Running, lines):
    served.http.get("/v1/nothing", headers={"X-Request-Id": 'a b="c" status=200'})
    assert eventually(lambda: len(lines.texts) == 1)
    _moment, level, message, *words = lines.texts[0].split(" ")
    assert (level, message) == ("INFO", "request")
    assert 'request_id="a b=\\"c\\" status=200"' in lines.texts[0]
    assert "status=404" in words
    assert "\n" not in lines.texts[0]


def test_a_message_can_not_steer_the_terminal():
    record = logging.LogRecord("x", logging.INFO, "", 0, "naïve \x1b[31m\u2028%s", ("a\r\nb",), None)
    assert LineFormatter("text").format(record).endswith(r"INFO naïve \x1b[31m\u2028a\r\nb")


def test_an_error_s_line_has_the_request_s_id_and_the_traceback(serve, lines, monkeypatch):
    served = serve()
    monkeypatch.setattr(served.server.service, "check_model", lambda name: 1 / 0)
    answer = served.http.post(
        "/v1/completions", json={"model": NAME, "prompt": SECRET}, headers={"X-Request-Id": "e-1"}
    )
    assert answer.status_code == 500
    assert ended(served, lines, 1)
    errors = [json.loads(text) for text in lines.texts if '"error"' in text]
    assert errors
    assert {line["request_id"] for line in errors} == {"e-1"}
    assert any("ZeroDivisionError" in line.get("traceback", "") for line in errors)
    assert SECRET not in "".join(lines.texts)


@pytest.mark.full
def test_a_process_that_logs_json_writes_nothing_else(model_dir):
    command = [sys.executable, "-m", "turnout", "serve", str(model_dir), "port=0", "log_format=json", "max_num_seqs=4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        events = []
        for text in process.stdout:
            events.append(json.loads(text))
            if events[-1]["event"] == "ready":
                break
        url = events[-1]["url"]
        body = {"model": events[1]["model"], "prompt": "The list", "max_tokens": 3, "ignore_eos": True}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200
        process.terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    rest = [json.loads(text) for text in output.splitlines()]
    assert [event["event"] for event in events] == ["loading", "loaded", "memory", "ready"]
    assert (rest[0]["message"], rest[0]["completion_tokens"]) == ("request", 3)
    assert [line.get("event") for line in rest] == [None, "stopped"]
    assert process.returncode == 0
