"""Requests over real HTTP: sent as they are wanted, timed exactly, and nothing that one meets stops another."""

import threading
import time

import pytest

from turnout import PeerError
from turnout.launch.benches import online
from turnout.launch.benches.figures import Slo, summary
from turnout.launch.benches.online import Ask, Target
from turnout.launch.benches.servers import free_port
from turnout.tests.launch.benches.scripted import DONE, EVENTS, Clock, frame, plain, scripted, usage

TTFT = (0.5, 2.0, 0.25, 4.0, 1.0, 0.75, 8.0, 1.5, 3.0, 6.0)
GAPS = (0.125, 0.25, 0.5)


def timed(clock):
    """A server whose first tokens take TTFT in turn, the next ones GAPS."""
    firsts = iter(TTFT)

    def play(asked, send):
        for i, gap in enumerate((next(firsts), *GAPS)):
            clock.pass_and_wait(gap, lambda i=i: send((b"" if i else EVENTS) + frame(" word")))
        send(usage(4) + DONE)

    return play


def test_percentiles_are_exact_within_the_clock():
    clock = Clock()
    with scripted(timed(clock)) as (url, _):
        wanted = [Ask(prompt="x", tokens=4) for _ in TTFT]
        answers = online.run(Target(url=url, model="m"), wanted, seats=1, clock=clock)
    assert [answer.ttft for answer in answers] == list(TTFT)
    found = summary(answers, Slo(ttft=2.0))
    assert [found[f"ttft_{one}"] for one in ("p50", "p90", "p99", "mean")] == [1.5, 6.0, 8.0, sum(TTFT) / 10]
    assert [found[f"tpot_{one}"] for one in ("p50", "p99", "mean")] == [sum(GAPS) / 3] * 3
    assert [found[f"itl_{one}"] for one in ("p50", "p90", "p99")] == [0.25, 0.5, 0.5]
    assert found["e2e_p99"] == 8.0 + sum(GAPS)
    seconds = sum(TTFT) + 10 * sum(GAPS)
    assert found["seconds"] == seconds
    assert found["tokens_per_second"] == 40 / seconds
    assert (found["goodput"], found["good_share"]) == (6 / seconds, 0.6)


def test_a_request_is_timed_from_when_it_was_due():
    """The server takes one at a time: whoever is behind has waited since it was due, not since it was served."""
    clock, meet, turn = Clock(), threading.Barrier(3), threading.Lock()

    def play(asked, send):
        meet.wait(20)  # all have been sent
        with turn:
            clock.pass_and_wait(1.0, lambda: send(EVENTS + frame(" word") + usage(1) + DONE))

    with scripted(play) as (url, _):
        answers = online.run(Target(url=url, model="m"), [Ask(prompt="x", tokens=1)] * 3, clock=clock)
    assert sorted(answer.ttft for answer in answers) == [1.0, 2.0, 3.0]


def test_a_client_that_is_behind_makes_nobody_look_faster():
    clock = Clock()
    answer = frame(" word") + usage(1) + DONE
    with scripted(lambda asked, send: clock.pass_and_wait(1.0, lambda: send(EVENTS + answer))) as (url, _):
        wanted = [Ask(prompt="x", tokens=1, due=2.0)]
        (late,) = online.run(Target(url=url, model="m"), wanted, clock=clock, start=-7.0)  # it begins 7 s too late
    assert (late.due, late.sent, late.ttft, late.e2e) == (2.0, 7.0, 6.0, 6.0)
    assert summary([late], Slo(ttft=5.0)) | {"late_p50": 5.0, "good_share": 0.0} == summary([late], Slo(ttft=5.0))


def test_an_open_loop_does_not_wait_and_a_closed_one_keeps_its_seats():
    meet, lock, running, most = threading.Barrier(3), threading.Lock(), [0], [0]

    def together(asked, send):
        meet.wait(20)  # only when three are there at once
        send(EVENTS + frame(" word") + usage(1) + DONE)

    with scripted(together) as (url, _):
        assert all(a.ok for a in online.run(Target(url=url, model="m"), [Ask(prompt="x", tokens=1)] * 3))

    def counted(asked, send):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        if most[0] < 2:
            time.sleep(0.05)  # so that a third would be seen
        with lock:
            running[0] -= 1
        send(EVENTS + frame(" word") + usage(1) + DONE)

    with scripted(counted) as (url, _):
        answers = online.run(Target(url=url, model="m"), [Ask(prompt="x", tokens=1, due=99.0)] * 9, seats=2)
    assert len(answers) == 9
    assert most[0] == 2
    assert all(answer.ok and answer.due <= answer.sent <= answer.times[0] <= answer.end for answer in answers)


def test_what_one_request_meets_stops_no_other():
    broken = {
        "refused": plain(429, b'{"error": {"message": "full"}}', "Retry-After: 1"),
        "cut": EVENTS + frame(" word"),
        "late error": EVENTS + frame(" word") + frame(error={"message": "broke"}),
        "silent": EVENTS + usage(0) + DONE,
    }
    fine = EVENTS + frame(" a") + frame(" b") + usage(2) + DONE
    with scripted(lambda asked, send: send(broken.get(asked["prompt"], fine))) as (url, _):
        wanted = [Ask(prompt=prompt, tokens=2) for prompt in ("fine", *broken, "fine")]
        answers = online.run(Target(url=url, model="m"), wanted)
    assert [answer.outcome for answer in answers] == ["ok", "429", "broken", "error frame", "ok", "ok"]
    found = summary(answers, Slo(ttft=1e9))
    assert (found["requests"], found["ok"], found["short"], found["tokens"]) == (6, 3, 1, 4)
    assert found["failed"] == {"429": 1, "broken": 1, "error frame": 1}
    assert found["good_share"] == 2 / 6
    assert answers[1].failure.endswith('{"error": {"message": "full"}}')


def test_nobody_there_is_an_outcome_for_a_request_and_an_error_for_the_list():
    url = f"http://127.0.0.1:{free_port()}"
    (answer,) = online.run(Target(url=url, model="m"), [Ask(prompt="x", tokens=1)])
    assert (answer.outcome, answer.sent, answer.status) == ("no connection", None, 0)
    with pytest.raises(PeerError, match="does not list its models"):
        online.models(url)


def test_a_server_that_falls_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(online, "TIMEOUT", 0.2)
    over = threading.Event()
    with scripted(lambda asked, send: (send(EVENTS + frame(" word")), over.wait(20))) as (url, _):
        (answer,) = online.run(Target(url=url, model="m"), [Ask(prompt="x", tokens=2)])
        over.set()
    assert (answer.outcome, answer.status, answer.tokens, answer.counted) == ("timeout", 200, 1, "pieces")
    assert answer.failure == "took more than 0.2 s"


def test_tokens_are_the_servers_count_or_else_pieces():
    def play(asked, send):
        told = {"several": usage(6), "none": b""}[asked["prompt"]]
        send(EVENTS + frame(" a b c") + frame(" d e f") + told + DONE)

    with scripted(play) as (url, _):
        target = Target(url=url, model="m")
        several, none = online.run(target, [Ask(prompt="several", tokens=6), Ask(prompt="none", tokens=6)])
    assert (several.tokens, several.counted, len(several.times), several.prompt_tokens) == (6, "usage", 2, 3)
    assert (none.tokens, none.counted, none.prompt_tokens) == (2, "pieces", None)
    assert summary([several], Slo())["tokens_per_piece"] == 3
    assert several.tpot == (several.times[1] - several.times[0]) / 5
    assert summary([several, none], Slo())["counted"] == "pieces"


def test_endpoint_key_and_streaming_reach_the_server():
    chat = frame(choices=[{"delta": {"content": "hi"}}])
    whole = plain(200, b'{"choices": [{"text": "hi"}], "usage": {"completion_tokens": 1}}')

    def play(asked, send):
        send(EVENTS + chat + usage(1) + DONE if asked["stream"] else whole)

    with scripted(play) as (url, seen):
        assert online.models(f"{url}/v1/", "secret") == ["scripted"]
        targets = [
            Target(url=f"{url}/v1", model="m", endpoint="chat", key="secret"),
            Target(url=url, model="m", stream=False, without=("ignore_eos",)),
        ]
        (talked,), (at_once,) = (online.run(target, [Ask(prompt="x", tokens=1)]) for target in targets)
    listed, first, second = seen
    assert listed["path"] == "/v1/models"
    assert listed["headers"]["Authorization"] == first["headers"]["Authorization"] == "Bearer secret"
    assert first["path"] == "/v1/chat/completions"
    assert first["body"] == {
        "model": "m", "max_tokens": 1, "temperature": 0, "stream": True, "ignore_eos": True,
        "messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert (second["path"], "Authorization" in second["headers"]) == ("/v1/completions", False)
    assert second["body"] == {"model": "m", "max_tokens": 1, "temperature": 0, "stream": False, "prompt": "x"}
    assert (talked.ok, len(talked.times)) == (True, 1)
    assert (at_once.ok, at_once.ttft, at_once.tpot, at_once.tokens) == (True, None, None, 1)


@pytest.mark.parametrize("unknown", [(), ("ignore_eos",), ("stream_options",), ("ignore_eos", "stream_options")])
def test_fields_that_a_server_does_not_know_are_left_out(unknown):
    def play(asked, send):
        bad = any(name in asked for name in unknown)
        send(plain(400, b"unknown field") if bad else EVENTS + frame(" word") + DONE)

    with scripted(play) as (url, _):
        assert online.known(Target(url=url, model="m"), Ask(prompt="x", tokens=1)).without == unknown
