"""Servers are started, take turns, are timed as a client sees them, and end; what is not installed is said."""

import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from turnout import ConfigError, PeerError
from turnout.launch.bench import main
from turnout.launch.benches import online, serve, servers
from turnout.launch.benches.online import Answer, Ask
from turnout.launch.workload import Job
from turnout.tests.inference.conftest import byte_level, model, model_dir  # noqa: F401  (fixtures)
from turnout.tests.launch.benches.double import Handler

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


def test_requests_are_sent_when_they_are_due_and_timed_to_the_token(url):
    assert online.models(url) == ["double"]
    wanted = [Ask(prompt=(1, 2), tokens=5), Ask(prompt="text", tokens=1, due=0.1), Ask(prompt=(3,), tokens=3)]
    first, late, third = online.run(url, "double", wanted)
    assert (first.tokens, late.tokens, third.tokens) == (5, 1, 3)
    assert first.ttft >= 0.02
    assert first.tpot >= 0.005
    assert late.tpot is None
    assert late.end >= 0.1 + 0.02 > late.ttft
    assert third.end < 0.1  # nobody waited for anybody


def test_the_summary_counts_all_tokens_over_all_the_time():
    answers = [Answer(ttft=float(i), tpot=None if i == 1 else 0.1 * i, tokens=10, end=i + 1.0) for i in range(1, 5)]
    found = online.summary(answers)
    assert found["tokens_per_second"] == 40 / 5
    assert (found["ttft_p50"], found["ttft_p99"]) == (2.0, 4.0)
    assert found["tpot_p50"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("prompt", "words"), [("refuse", "answered .* 400"), ("short", "gave 1 of 2 tokens"), ("break", "it broke")]
)
def test_what_goes_wrong_is_an_error_that_says_so(url, prompt, words):
    with pytest.raises(PeerError, match=words):
        online.run(url, "double", [Ask(prompt=prompt, tokens=2)])


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(PeerError, match="does not list its models"):
        online.models(f"http://127.0.0.1:{servers.free_port()}")


def test_installed_servers_have_rows_and_the_others_a_note(peers):
    wanted = serve.asks([Job(prompt=tuple(range(1, 9)), tokens=4, arrival=0.1 * i) for i in range(3)], rate=10.0)
    rows = serve.compare("model", wanted, (), peers, rounds=2, own=False)
    (vllm, llama) = rows
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


def test_a_server_that_ends_at_once_is_an_error_with_its_own_words(tmp_path):
    command = servers.Command(name="sour", words=(sys.executable, "-c", "raise SystemExit('no milk')"), environment={})
    own = servers.started(command, servers.free_port(), tmp_path / "log")
    with pytest.raises(PeerError, match=r"(?s)sour did not start.*no milk"), own:
        pytest.fail("it started")


def test_no_prompt_is_sent_twice_and_texts_stand_for_tokens():
    assert serve._fresh((5, 6, 7), 0) == (6, 6, 7)
    assert serve._fresh((5, 6, 7), 1) == (7, 6, 7)
    assert serve._fresh("text", 3) == "3 text"
    text = "".join(chr(97 + i % 26) for i in range(20_000))
    wanted = serve.texts(text, count=5, rate=2.0)
    assert all(ask.prompt in text and len(ask.prompt) % serve.CHUNK == 0 for ask in wanted)
    assert [ask.due for ask in wanted] == sorted(ask.due for ask in wanted)


def test_a_running_server_is_measured_by_its_address(url, capsys):
    assert main(["serve", f"url={url}", "requests=2"]) == 0
    assert url in capsys.readouterr().out
    with pytest.raises(ConfigError, match="url"):
        main(["serve"])
    with pytest.raises(ConfigError, match=r"peers .* is no folder"):
        main(["serve", "x", "peers=/nowhere", "workload=/nowhere"])


@pytest.mark.full
def test_ours_is_started_and_measured(model_dir, peers, capsys):  # noqa: F811
    settings = ("requests=2", "engine.num_blocks=80", "engine.enable_prefix_caching=false")
    assert main(["serve", str(model_dir), f"peers={peers}", "rate=20", *settings]) == 0
    header, ours, theirs, absent = capsys.readouterr().out.splitlines()
    assert "ready_seconds" in header
    assert ours.split()[0] == "turnout"
    assert theirs.split()[0] == "vllm"
    assert "not installed" in absent
