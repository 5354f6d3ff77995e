"""Our own server under load: every token it counts is counted, a full queue is counted and ends nothing."""

import json
import threading

import pytest

from turnout.inference.text.chat import ChatTemplate
from turnout.launch.bench import main
from turnout.launch.benches import online
from turnout.launch.benches.figures import Slo, summary
from turnout.launch.benches.online import Ask, Target
from turnout.launch.benches.serve import AFTER, REPEATS
from turnout.tests.helpers.waiting import eventually
from turnout.tests.inference.conftest import byte_level, model  # noqa: F401  (fixtures)
from turnout.tests.inference.server.conftest import NAME, serve  # noqa: F401  (fixtures)

SHAPES = (
    ("load=closed", "concurrency=1,3", "slo.ttft=60", "slo.tpot=60"),
    ("stream=false", "load=burst", "burst.size=3", "burst.gap=0.05"),
    ("load=ramp", "ramp.end=90", "ramp.seconds=1", "clients=2"),
)


def check(served, folder, rounds, requests, *shape):
    """Put the server under a load, and compare what both have counted."""
    before = served.metrics()["generation_tokens_total"]
    settings = (f"requests={requests}", f"rounds={rounds}", "warmup=2", "prompt_tokens=4,12", "output_tokens=2,9")
    paths = (f"json={folder / 'found.json'}", f"requests_json={folder / 'requests.jsonl'}")
    assert main(["serve", f"url={served.url}", *settings, *shape, *paths]) == 0
    rows = json.loads((folder / "found.json").read_text())["rows"]
    asked = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    assert [one["outcome"] for one in asked] == ["ok"] * rounds * requests * len(rows)
    assert all(one["tokens"] == one["wanted"] and one["counted"] == "usage" for one in asked)
    assert all((row["ok"], row["short"], row["failed"]) == (rounds * requests, 0, {}) for row in rows)
    assert sum(row["tokens"] for row in rows) == sum(one["tokens"] for one in asked)
    warm = rounds * sum(one["wanted"] for one in asked[:2])  # the first two of each turn
    alone = "endpoint=chat" not in shape  # with its prefixes that prompt exceeds this model's context
    warm += 1 + rounds * REPEATS * AFTER * alone  # which fields it takes, and requests alone
    counted = before + warm + sum(one["tokens"] for one in asked)
    assert eventually(lambda: served.metrics()["generation_tokens_total"] == counted)
    streams = "stream=false" not in shape
    assert ("ttft_p99" in rows[0], "ttft_alone" in rows[0]) == (streams, streams and alone)
    assert ("good_share" in rows[0]) is ("slo.ttft=60" in shape)


def test_tokens_are_those_that_the_server_counts(serve, byte_level, tmp_path):  # noqa: F811
    served = serve()
    source = "{% for message in messages %}{{ message.content }}{% endfor %}"
    served.server.service.engine.chat = ChatTemplate(byte_level, source)
    check(served, tmp_path, 1, 5, "endpoint=chat", "rate=200", "prefix_tokens=16", "prefixes=2")


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_those_that_the_server_counts_in_every_shape(serve, tmp_path, shape):  # noqa: F811
    check(serve(), tmp_path, 2, 6, *shape)


def test_a_full_queue_is_counted_and_ends_nothing(serve):  # noqa: F811
    served = serve(max_num_seqs=1, max_waiting=2)
    served.engine.pace = 0.05

    def refused():
        return served.metrics().get("http_requests_total{route=/v1/completions,status=429}", 0)

    def quicken():
        eventually(lambda: refused() > 0)
        served.engine.pace = 0.0

    thread = threading.Thread(target=quicken)
    thread.start()
    answers = online.run(Target(url=served.url, model=NAME), [Ask(prompt=(1, 2, i), tokens=40) for i in range(8)])
    thread.join()
    found = summary(answers, Slo(ttft=60.0))
    full = found["failed"]["429"]
    assert 1 <= full <= 6  # two may wait, whether or not one runs already
    assert found["failed"] == {"429": full}
    assert eventually(lambda: refused() == full)
    assert (found["ok"], found["tokens"], found["good_share"]) == (8 - full, 40 * (8 - full), 1 - full / 8)
    assert all("queue" in answer.failure for answer in answers if not answer.ok)
