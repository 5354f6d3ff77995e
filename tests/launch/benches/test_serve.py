"""Servers are started, take turns, are timed as a client sees them, and end; what is not installed is said."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from turnout import ConfigError, PeerError
from turnout.launch.bench import main
from turnout.launch.bench_serve import peers_rows
from turnout.launch.benches import online, serve, servers
from turnout.launch.benches.online import Ask
from turnout.launch.workload import Job
from turnout.tests.inference.conftest import byte_level, model, model_dir  # noqa: F401  (fixtures)
from turnout.tests.launch.benches.double import Handler
from turnout.tests.launch.benches.scripted import DONE, EVENTS, frame, plain, scripted, usage

DOUBLE = Path(__file__).with_name("double.py")


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def peers(tmp_path):
    """A folder in which the double is installed as vLLM."""
    program = tmp_path / "venvs" / "vllm" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n{DOUBLE.read_text()}")
    program.chmod(0o755)
    return tmp_path


def test_installed_servers_have_rows_and_the_others_a_note(peers):
    jobs = [Job(prompt=tuple(range(1, 9)), tokens=4, arrival=0.1 * i) for i in range(3)]
    vllm, llama = peers_rows("model", jobs, 10.0, peers, rounds=2)
    assert vllm["server"] == "vllm"
    assert 0 < vllm["tokens_per_second"] < 4000
    assert vllm["ttft_alone"] >= 0.02
    assert vllm["tpot_alone"] >= 0.005
    assert vllm["ready_seconds"] > 0
    assert vllm["peak_mb"] > 5
    assert llama == {"server": "llama.cpp", "note": "not installed"}


def test_a_sleeping_server_answers_when_it_is_woken_and_ends_with_the_block(peers, tmp_path):
    port = servers.free_port()
    command = servers.vllm(peers, "model", port, seats=4)
    assert command is not None
    with servers.started(command, port, tmp_path / "log") as server:
        server.sleep()
        deadline = time.monotonic() + 10
        while (state := Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
            assert time.monotonic() < deadline, state
            time.sleep(0.01)
        server.wake()
        assert online.models(server.url) == ["double"]
        server.sleep()
    assert servers.peak_bytes(server.pid) == 0


def test_a_bench_that_is_ended_leaves_no_server_behind(peers, tmp_path):
    """The double is asleep, as servers are between their turns."""
    script = (
        "import sys, time; from pathlib import Path; from turnout.launch.benches import serve\n"
        "from turnout.launch.benches.online import Target\n"
        "with serve.begun('model', (), Path(sys.argv[1]), 4, Target(url='', model=''), own=False) as (found, _):\n"
        "    print(found[0].running.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen((sys.executable, "-c", script, peers), stdout=subprocess.PIPE, text=True) as bench:
        pid = int(bench.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        bench.terminate()
        assert bench.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid}").exists()


def test_a_server_that_ends_at_once_is_an_error_with_its_own_words(tmp_path):
    command = servers.Command(name="sour", words=(sys.executable, "-c", "raise SystemExit('no milk')"), environment={})
    own = servers.started(command, servers.free_port(), tmp_path / "log")
    with pytest.raises(PeerError, match=r"(?s)sour did not start.*no milk"), own:
        pytest.fail("it started")


def test_no_prompt_is_sent_twice_but_what_is_shared_is_shared_again():
    assert serve.fresh(Ask(prompt=(5, 6, 7), tokens=1), 0).prompt == (6, 6, 7)
    assert serve.fresh(Ask(prompt=(5, 6, 7), tokens=1), 1).prompt == (7, 6, 7)
    assert serve.fresh(Ask(prompt="text", tokens=1), 3).prompt == "3 text"
    head = (1, 2, 3)
    for use in range(6):
        one, other = (serve.fresh(Ask(prompt=(*head, *rest), tokens=1, shared=3), use) for rest in ((9,) * 4, (8,) * 5))
        assert one.prompt[:3] == other.prompt[:3]


def fine(asked, send):
    send(EVENTS + b"".join(frame(f" {i}") for i in range(asked["max_tokens"])) + usage(asked["max_tokens"]) + DONE)


def test_servers_get_the_same_requests_in_turns_whose_order_alternates(tmp_path, capsys):
    heard = []

    def noted(who):
        return lambda asked, send: (heard.append((who, asked)), fine(asked, send))

    with scripted(noted("one")) as (one, _), scripted(noted("other")) as (other, _):
        settings = ("requests=3", "rounds=2", "warmup=2", "rate=500,1000", "slo.ttft=100")
        paths = (f"json={tmp_path / 'found.json'}", f"requests_json={tmp_path / 'requests.jsonl'}")
        assert main(["serve", f"url={one},{other}", f"plot={tmp_path / 'x.png'}", *settings, *paths]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    asked = [(who, body["prompt"], body["max_tokens"]) for who, body in heard]
    turns = [who for who, _ in itertools.groupby(asked, key=lambda it: it[0])]
    assert turns == ["one", "other", "one"]  # the other, then the one in the second round
    mine, theirs = ([it[1:] for it in asked if it[0] == who] for who in ("one", "other"))
    assert sorted(mine) == sorted(theirs)
    assert len(mine) == 1 + 2 * (2 + serve.REPEATS + 2 * 3)  # what fits; warm-up, alone, two rates
    assert len({prompt for prompt, _ in mine}) == len(mine)
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["server"], row["rate"], row["ok"]) for row in found if "server" in row] == [
        (url, rate, 6) for url in (one, other) for rate in (500.0, 1000.0)
    ]
    assert all(row["good_share"] == 1.0 and row["goodput"] > 0 for row in found if "server" in row)
    pairs = [row for row in found if "pair" in row]
    known = [(row["rate"], row["figure"]) for row in pairs if row["figure"] != "tpot"]  # pieces may come at once
    assert known == [(rate, figure) for rate in (500.0, 1000.0) for figure in ("ttft", "e2e", "tokens_per_second")]
    assert all(row["p10"] <= row["ratio"] <= row["p90"] and row["pairs"] in (2, 6) for row in pairs)
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 2 * 3
    for line in lines:
        assert line["due"] <= line["sent"] <= line["first"] == line["times"][0] <= line["end"]
        assert (line["status"], len(line["times"])) == (200, line["tokens"])
    text = capsys.readouterr().out
    assert len(text.split("\n\n")) == 3
    assert "goodput" in text
    assert "late" in text


def test_refusals_are_counted_and_do_not_end_the_run(capsys, tmp_path):
    turns = itertools.count()

    def play(asked, send):
        full = asked["max_tokens"] > 1 and next(turns) % 2
        send(plain(429, b"full")) if full else fine(asked, send)

    with scripted(play) as (url, _):
        settings = ("requests=8", "load=closed", "concurrency=1", "output_tokens=2")
        assert main(["serve", f"url={url}", f"json={tmp_path / 'x.json'}", *settings]) == 0
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (row["requests"], row["ok"], row["failed"], row["tokens"]) == (8, 4, {"429": 4}, 8)
    assert "429: 4" in capsys.readouterr().out


def test_nothing_but_refusals_is_an_error():
    with (
        scripted(lambda asked, send: send(plain(429, b"full"))) as (url, _),
        pytest.raises(PeerError, match=r"answered 429: full: no request of 2"),
    ):
        main(["serve", f"url={url}", "requests=2"])


def test_a_running_server_is_measured_by_its_address(url, capsys):
    assert main(["serve", f"url={url}", "requests=2"]) == 0
    assert url in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (r"url \(None\) is needed", ()), (r"url \(nowhere\)", ("url=nowhere",)), ("has one twice", ("url=http://a,http://a",)),
        ("peers .* is no folder", ("x", "peers=/nowhere", "workload=/nowhere")),
        ("peers .* on a CKPT", ("url=http://a", "peers=/tmp")), ("stream", ("stream=false", "slo.ttft=1")),
        ("rounds", ("rounds=0",)), ("clients", ("clients=0",)), ("warmup", ("warmup=-1",)),
        ("slo.ttft", ("slo.ttft=0",)),
        ("load .* needs a trace", ("load=trace",)), ("endpoint=completions", ("workload=x", "endpoint=chat")),
        ("api_key", ("x", "api_key=k")), ("experts is not a setting", ("experts=4",)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(words, settings):
    with pytest.raises(ConfigError, match=words):
        main(["serve", *settings])


@pytest.mark.full
def test_ours_is_started_and_measured(model_dir, peers, capsys):  # noqa: F811
    settings = ("requests=2", "engine.num_blocks=80", "engine.enable_prefix_caching=false")
    assert main(["serve", str(model_dir), f"peers={peers}", "rate=20", *settings]) == 0
    header, ours, theirs, absent, *_ = capsys.readouterr().out.splitlines()
    assert "ready_seconds" in header
    assert ours.split()[0] == "turnout"
    assert theirs.split()[0] == "vllm"
    assert "not installed" in absent
