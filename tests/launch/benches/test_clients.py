"""Several processes send what one would, from the same beginning on."""

import threading

from turnout.launch.benches.clients import drive
from turnout.launch.benches.online import Ask, Target
from turnout.tests.launch.benches.scripted import DONE, EVENTS, frame, scripted, usage


def test_two_clients_share_the_requests():
    meet = threading.Barrier(5)

    def play(asked, send):
        meet.wait(60)  # only when those of both are there
        tokens = asked["max_tokens"]
        send(EVENTS + frame(" word") * tokens + usage(tokens) + DONE)

    with scripted(play) as (url, seen):
        asks = [Ask(prompt=(i, 1) if i % 3 else f"{i}", tokens=i + 1, due=0.01 * i) for i in range(5)]
        answers, share = drive(Target(url=url, model="m", without=("ignore_eos",)), asks, clients=2)
    assert [(a.tokens, len(a.times), a.ok, a.due) for a in answers] == [
        (i + 1, i + 1, True, 0.01 * i) for i in range(5)
    ]
    assert all(answer.due <= answer.sent <= answer.times[0] <= answer.end for answer in answers)
    assert 0 < share < 1.5
    assert sorted(str(one["body"]["prompt"]) for one in seen) == sorted(["0", "[1, 1]", "[2, 1]", "3", "[4, 1]"])
    assert not any("ignore_eos" in one["body"] for one in seen)


def test_a_seat_is_one_clients():
    def play(asked, send):
        send(EVENTS + frame(" word") + usage(1) + DONE)

    with scripted(play) as (url, _):
        answers, _ = drive(Target(url=url, model="m"), [Ask(prompt="x", tokens=1)] * 3, seats=1, clients=2)
    assert [answer.ok for answer in answers] == [True] * 3
    assert answers[0].end <= answers[1].due <= answers[1].end <= answers[2].due
