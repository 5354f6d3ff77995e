"""Replicas under Ray Serve: real ones, behind one port, with one of them killed while streams run.

A cluster takes half a minute to start, so that what needs one runs with `--full`.
"""

import asyncio
import collections
import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from turnout import ConfigError
from turnout.inference.errors import EngineStoppedError
from turnout.launch import ray_serve
from turnout.launch.cli import parse
from turnout.launch.main import run
from turnout.launch.ray_serve import RayOptions

ASK = {"model": "first", "temperature": 0, "ignore_eos": True}
REPLICA = "x-turnout-replica"
WORDS = "The list of the things that are imported. "


@dataclasses.dataclass
class Cluster:
    """`python -m turnout.launch.ray_serve`, and how to reach it."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    told: bool = False

    def stop(self) -> None:
        """Tell it to end, once: a second signal would not wait."""
        if not self.told:
            self.process.terminate()
        self.told = True

    def replicas(self) -> list[psutil.Process]:
        return [child for child in self.family() if "ServeReplica:turnout" in " ".join(child.cmdline())]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ask(self, prompt: str, **body: object) -> httpx.Response:
        asked = ASK | {"prompt": prompt, "max_tokens": 2} | body
        return httpx.post(f"{self.url}/v1/completions", json=asked, timeout=60, trust_env=False)


@contextmanager
def serving(checkpoint: Path, *settings: str) -> Iterator[Cluster]:
    """A cluster of its own, whose files go with it; at the end nothing of it is left."""
    with place() as folder, started(folder, checkpoint, *settings) as cluster:
        yield cluster


@contextmanager
def place() -> Iterator[Path]:
    """Where Ray keeps its files. Below /tmp: its sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    (folder / "token").write_text(secrets.token_hex(32))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(folder: Path) -> dict[str, str]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    return os.environ | {"RAY_TMPDIR": str(folder)} | token


@contextmanager
def started(folder: Path, checkpoint: Path, *settings: str) -> Iterator[Cluster]:
    """The command; it must end by itself, with all that it has started."""
    log, ready = folder / "log", folder / "ready.json"
    command = [sys.executable, "-m", "turnout.launch.ray_serve", str(checkpoint), "port=0", f"json={ready}", *settings]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment(folder))
    family: list[psutil.Process] = []
    try:
        assert within(180, lambda: ready.exists() or process.poll() is not None)
        assert within(1, ready.exists), log.read_text()
        cluster = Cluster(process, json.loads(ready.read_text())["url"], log)
        family = cluster.family()
        yield cluster
        cluster.stop()
        assert process.wait(60) == 0, log.read_text()
        assert log.read_text().splitlines()[-1] == "stopped"
        assert within(10, lambda: not any(child.is_running() for child in family)), "processes are left"
    finally:
        process.kill()
        process.wait()
        for child in family:
            if child.is_running():
                child.kill()


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether the condition becomes true; the time only bounds a failing test."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture(scope="module")
def cluster(checkpoint) -> Iterator[Cluster]:
    with serving(checkpoint, "replicas=2", "max_num_seqs=16") as started:
        yield started


@dataclasses.dataclass
class Stream:
    """One stream as its client saw it."""

    status: int
    replica: str | None
    frames: list[str]

    def ended(self) -> str:
        """How: `done`, an error's code, or `cut`."""
        last = self.frames[-1] if self.frames else ""
        if last == "[DONE]":
            return "done"
        return json.loads(last).get("error", {}).get("code", "cut") if last else "cut"

    def tokens(self) -> int:
        """As its usage has it, which comes last."""
        return json.loads(self.frames[-2])["usage"]["completion_tokens"]


async def stream(client: httpx.AsyncClient, prompt: str, tokens: int) -> Stream:
    usage = {"stream_options": {"include_usage": True}}
    body = ASK | {"prompt": prompt, "max_tokens": tokens, "stream": True} | usage
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            text = (await answer.aread()).decode()
            replica = answer.headers.get(REPLICA)
    except httpx.TransportError:
        return Stream(0, None, [])
    if answer.status_code != 200:
        return Stream(answer.status_code, replica, [text])
    return Stream(200, replica, [frame.removeprefix("data: ") for frame in text.rstrip().split("\n\n")])


async def load(cluster: Cluster, number: int, tokens: int, at_work: Callable[[], None]) -> list[Stream]:
    """Streams before and after `at_work`, which is called in the middle of the first ones."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=120, trust_env=False, limits=limits) as client:
        first = [asyncio.create_task(stream(client, f"{i} {WORDS}", tokens)) for i in range(number)]
        await asyncio.sleep(1)
        at_work()
        more = [asyncio.create_task(stream(client, f"{i} {WORDS}", tokens)) for i in range(number)]
        return await asyncio.gather(*first, *more)


@pytest.mark.full
def test_replicas_answer_as_one_server(cluster):
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["first"]
    whole = client.completions.create(model="first", prompt=WORDS, max_tokens=20, temperature=0)
    parts = client.completions.create(model="first", prompt=WORDS, max_tokens=20, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="first", prompt=WORDS, max_tokens=-1)
    with pytest.raises(openai.NotFoundError, match="use first"):
        client.completions.create(model="other", prompt=WORDS)
    for path in ("/health", "/ready", "/metrics", "/load", "/v1/experts", "/", "/nowhere"):
        answer = httpx.get(f"{cluster.url}{path}", trust_env=False, timeout=30)
        assert (answer.status_code, REPLICA in answer.headers) == (404 if path == "/nowhere" else 200, True), path


@pytest.mark.full
def test_every_request_has_its_line(cluster):
    names = [f"request-{i}" for i in range(30)]
    body = ASK | {"prompt": WORDS, "max_tokens": 1}
    for name in names:
        headers = {"X-Request-Id": name}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=30, trust_env=False)
        assert answer.headers.get_list("x-request-id") == [name]
    assert within(20, lambda: all(f"request_id={name} " in cluster.log.read_text() for name in names))


@pytest.mark.full
def test_a_stream_is_passed_on_as_it_comes(cluster):
    body = ASK | {"prompt": WORDS, "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
        assert sum(1 for _ in answer.iter_raw()) > 40


@pytest.mark.full
def test_a_prompt_goes_where_its_beginning_is_known_and_others_go_where_there_is_room(cluster):
    for name in "abcdef":
        answers = [cluster.ask(f"{name} " * 100 + str(i)) for i in range(4)]
        assert len({answer.headers[REPLICA] for answer in answers}) == 1
        cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert cached[0] == 0
        assert min(cached[1:]) > 0
    others = collections.Counter(cluster.ask(f"{i} of another kind").headers[REPLICA] for i in range(40))
    assert len(others) == 2

    async def all_at_once() -> list[Stream]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=120, trust_env=False, limits=limits) as client:
            return await asyncio.gather(*(stream(client, "a " * 100, 50) for _ in range(30)))

    same = collections.Counter(one.replica for one in asyncio.run(all_at_once()))
    assert len(same) == 2, "one beginning that all ask for does not stay with one replica"


@pytest.mark.full
def test_a_killed_replica_cuts_no_stream_in_silence_and_comes_back(cluster):
    before = {child.pid for child in cluster.replicas()}
    assert len(before) == 2
    found = asyncio.run(load(cluster, 24, 300, lambda: os.kill(min(before), signal.SIGKILL)))
    ends = collections.Counter(one.ended() for one in found)
    assert set(ends) == {"done", "replica_lost"}, ends
    assert ends["replica_lost"] <= 24
    assert all(one.tokens() == 300 for one in found if one.ended() == "done")
    lost = {one.replica for one in found if one.ended() == "replica_lost"} - {None}
    assert len(lost) <= 1, "only what ran on the killed one is lost"
    assert within(90, lambda: len({child.pid for child in cluster.replicas()} - {min(before)}) == 2)
    assert within(90, lambda: len({cluster.ask(f"{i}").headers.get(REPLICA) for i in range(20)} - {None}) == 2)
    assert cluster.ask(WORDS).status_code == 200


@pytest.mark.full
def test_the_first_signal_lets_streams_finish(checkpoint):
    with serving(checkpoint, "replicas=2", "api_key=secret", "served_model_name=first") as cluster:
        assert cluster.ask(WORDS).status_code == 401
        key = {"Authorization": "Bearer secret"}

        async def go() -> tuple[list[Stream], httpx.Response]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=cluster.url, timeout=120, trust_env=False, limits=limits, headers=key
            ) as client:
                running = [asyncio.create_task(stream(client, f"{i} {WORDS}", 400)) for i in range(12)]
                await asyncio.sleep(1)
                cluster.stop()
                await asyncio.sleep(1)
                late = await client.get("/ready")
                return await asyncio.gather(*running), late

        found, late = asyncio.run(go())
        assert collections.Counter(one.ended() for one in found) == {"done": 12}
        assert all(one.tokens() == 400 for one in found)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "unavailable"


@pytest.mark.full
def test_a_checkpoint_that_is_not_there_ends_the_start(tmp_path):
    command = [sys.executable, "-m", "turnout.launch.ray_serve", str(tmp_path / "none"), "port=0"]
    with place() as folder:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment(folder))
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("turnout: no replica of ")
    assert "none holds no model" in done.stderr.splitlines()[-1]


@pytest.mark.full
def test_there_are_more_replicas_while_there_is_more_to_do(checkpoint):
    with serving(checkpoint, "replicas=1", "max_replicas=2", "target_ongoing_requests=2") as cluster:
        assert len(cluster.replicas()) == 1
        seen: list[Stream] = []

        def busy() -> bool:
            seen.extend(asyncio.run(load(cluster, 8, 300, lambda: None)))
            return len({one.replica for one in seen[-16:]}) == 2

        assert within(180, busy)
        assert collections.Counter(one.ended() for one in seen) == {"done": len(seen)}


@pytest.mark.full
def test_a_cluster_that_was_there_before_stays(checkpoint):
    with place() as folder:
        address = f"127.0.0.1:{free_port()}"
        head = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false",
            f"--temp-dir={folder}",
        ]  # fmt: skip
        with (folder / "head").open("w") as output:
            ray = subprocess.Popen(head, stdout=output, stderr=subprocess.STDOUT, env=environment(folder))
        try:
            assert within(90, lambda: "--block" in (folder / "head").read_text()), (folder / "head").read_text()
            family = psutil.Process(ray.pid).children(recursive=True)
            with started(folder, checkpoint, "replicas=1", f"ray_address={address}") as cluster:
                assert cluster.ask(WORDS).headers[REPLICA]
                assert cluster.ask(WORDS, stream=True, max_tokens=20).text.endswith("data: [DONE]\n\n")
            assert ray.poll() is None
            assert all(child.is_running() for child in family)
            with pytest.raises(httpx.HTTPStatusError, match="503"):
                cluster.ask(WORDS).raise_for_status()
        finally:
            ray.terminate()
            ray.wait(60)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.full
def test_a_replica_whose_engine_broke_is_unhealthy(checkpoint):
    from turnout.launch.ray_replica import Replica

    async def live() -> None:
        replica = Replica(str(checkpoint), RayOptions(served_model_name="first"))
        engine = replica.service.engine
        assert engine is not None
        assert replica.service.phase == "ready"
        await replica.check_health()
        assert replica.service.history.uptime > 0, "what /v1/experts tells"
        engine.shutdown()
        with pytest.raises(EngineStoppedError, match="log"):
            await replica.check_health()
        assert replica.service.phase == "broken"

    asyncio.run(live())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["replicas=0"], "replicas (0)"),
        (["replicas=3", "max_replicas=2"], "max_replicas (2) must be at least replicas (3)"),
        (["target_ongoing_requests=0"], "target_ongoing_requests (0.0)"),
        (["replica_cpus=-1"], "replica_cpus (-1.0)"),
        (["replica_gpus=inf"], "replica_gpus (inf)"),
        (["nproc=2"], "nproc (2) must be 1"),
        (["host=0.0.0.0"], "host (0.0.0.0)"),
        (["max_num_seqs=0"], "max_num_seqs (0)"),
        (["replica=2"], "did you mean replicas?"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_starts(settings, names, capsys):
    assert run(ray_serve.main, ["runs/x", *settings]) == 2
    assert names in capsys.readouterr().err


def test_the_servers_settings_are_the_replicas():
    _, options = parse(RayOptions, ["runs/x", "replicas=2", "max_num_seqs=8", "drain_seconds=5"], words=["ckpt"])
    assert (options.replicas, options.max_num_seqs, options.drain_seconds) == (2, 8, 5.0)
    with pytest.raises(ConfigError, match="nproc"):
        dataclasses.replace(options, nproc=2)


def test_help_names_every_setting_of_its_own(capsys):
    assert ray_serve.main(["--help"]) == 0
    text = capsys.readouterr().out
    own = set(RayOptions.__dataclass_fields__) - set(ray_serve.ServeOptions.__dataclass_fields__)
    assert own
    assert all(f"  {name}=" in text for name in own)
