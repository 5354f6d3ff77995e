"""The console's files and numbers over HTTP; `test_console_page.py` has the page in a browser."""

import threading

import pytest

from turnout.inference.server.console import FOLDER, MOST_SHARES, _newest
from turnout.inference.timeline import StepRecord
from turnout.tests.helpers.waiting import eventually

from .conftest import ENGINE, SLOW, Running, Serve

PROMPT = "The import statement combines two operations"
PAGES = ["/", *sorted(f"/console/{path.name}" for path in FOLDER.iterdir())]


def steps(running: Running, since: int = 0) -> dict:
    answer = running.get(f"/v1/console/steps?since={since}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_page_s_files_need_no_key_and_are_sent_once(serve: Serve):
    running = serve(server={"api_key": "secret"})
    assert len(PAGES) > 10
    for path in PAGES:
        answer = running.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
    answer = running.get("/console/app.js")
    again = running.http.get("/console/app.js", headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    other = running.http.get("/console/app.js", headers={"If-None-Match": '"other"'})
    assert other.content == answer.content != b""


def test_the_page_asks_no_other_host_and_has_no_inline_script():
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 400, path.name
        for scheme in ("http://", "https://"):
            assert scheme not in text.replace("http://www.w3.org/2000/svg", ""), path.name
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert "<style" not in page
    assert page.count("<script") == page.count('<script type="module" src=') >= 1


def test_the_numbers_need_the_key(serve: Serve):
    running = serve(server={"api_key": "secret"})
    for path in ("/v1/console/state", "/v1/console/steps", "/v1/console/", "/console"):
        assert running.get(path).status_code == 401
    assert running.http.get("/v1/console/state", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("path", ["/console/", "/console/none.js", "/console/../errors.py"])
def test_there_are_no_other_files(served: Running, path):
    assert served.get(path).status_code == 404


@pytest.mark.parametrize("since", ["-1", "x", "1.5", "%C2%B2", "9" * 19])
def test_a_step_that_is_no_number_is_refused(served: Running, since):
    answer = served.get(f"/v1/console/steps?since={since}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "since"


def test_every_token_of_a_request_is_in_one_step(served: Running):
    first = steps(served)["last"]
    usage = served.post(prompt=PROMPT, max_tokens=9, ignore_eos=True, cache_salt="own").json()["usage"]
    found = steps(served, first)
    assert [step["number"] for step in found["steps"]] == list(range(first + 1, found["last"] + 1))
    ((name, arrival, prompt, began),) = found["requests"]
    assert name.startswith("cmpl-")
    assert prompt == usage["prompt_tokens"]
    shares = [step["shares"] for step in found["steps"]]
    assert shares[0] == [0, 0, prompt, 2]
    assert shares[1:] == [[0, prompt + i, 1, 1] for i in range(8)]
    ends = [step["start"] + step["seconds"] for step in found["steps"]]
    assert arrival <= found["steps"][0]["start"]
    assert began == pytest.approx(ends[0], abs=2e-6)
    assert ends == sorted(ends)
    assert ends[-1] <= found["clock"] + 1e-6
    assert [step["tokens"] for step in found["steps"]] == [prompt] + [1] * 8
    assert [step["running"] for step in found["steps"]] == [1] * 8 + [0]


def test_a_long_prompt_is_chunks_and_the_last_gives_a_token(served: Running):
    first, budget = steps(served)["last"], ENGINE["max_num_batched_tokens"]
    served.post(prompt=[7] * (2 * budget + 5), max_tokens=1, cache_salt="own chunks")
    found = [step["shares"] for step in steps(served, first)["steps"]]
    assert found == [[0, 0, budget, 0], [0, budget, budget, 0], [0, 2 * budget, 5, 2]]


def test_a_preempted_request_is_named_and_computed_again(serve: Serve):
    running = serve(num_blocks=9, max_num_seqs=4, block_size=16, enable_prefix_caching=False)
    steps(running)
    threads = [
        threading.Thread(target=running.post, kwargs={"prompt": [9 + i] * 30, "max_tokens": 40, "ignore_eos": True})
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = steps(running)
    lost = {request for step in found["steps"] for request in step["preempted"]}
    assert lost
    for request in lost:
        starts = [
            start
            for step in found["steps"]
            for place, start in zip(step["shares"][::4], step["shares"][1::4], strict=True)
            if place == request
        ]
        assert starts.count(0) == 2


def test_an_answer_is_bounded_and_keeps_the_newest():
    def record(number: int, requests: int) -> StepRecord:
        return StepRecord(number, 0.0, 0.1, 1, ((None, 0, 1, True),) * requests, (), 1, 0, 0.5)  # type: ignore[arg-type]

    few, many = MOST_SHARES // 4, MOST_SHARES + 1
    assert [r.number for r in _newest([record(i, few) for i in range(9)])] == [5, 6, 7, 8]
    assert _newest([record(1, 1), record(2, many)]) == []
    assert len(_newest([record(i, 1) for i in range(9)])) == 9


def test_the_state_has_every_block(serve: Serve):
    running = serve()
    running.engine.gate.clear()
    before = running.get("/v1/console/state").json()
    assert before["phase"] == "ready"
    assert before["kv"] == [{"blocks": 255, "runs": [0, 255]}]
    assert before["settings"]["max_num_seqs"] == ENGINE["max_num_seqs"]
    running.engine.gate.set()
    usage = running.post(prompt=[7] * 40, max_tokens=4, ignore_eos=True).json()["usage"]
    assert eventually(running.idle)
    after = running.get("/v1/console/state").json()
    runs = after["kv"][0]["runs"]
    assert sum(runs[1::2]) == 255
    assert dict(zip(runs[::2], runs[1::2], strict=True))[1] == 2  # 40 tokens fill two blocks
    assert after["queue"]["computed_tokens"] == usage["total_tokens"] - 1
    assert after["moe"] == {"num_experts": 4, "top_k": 1, "routed_layers": [1, 3]}


def test_blocks_that_a_request_holds_are_used(serve: Serve):
    running = serve()
    running.engine.pace = SLOW
    with running.http.stream("POST", "/v1/completions", json={
        "model": "tiny", "prompt": [7] * 40, "max_tokens": 100, "stream": True, "ignore_eos": True,
    }) as answer:  # fmt: skip
        lines = answer.iter_lines()  # held: it would close the connection when it goes
        next(lines)
        running.engine.gate.clear()
        runs = running.get("/v1/console/state").json()["kv"][0]["runs"]
        assert sum(n for state, n in zip(runs[::2], runs[1::2], strict=True) if state == 2) >= 3
        running.engine.pace = 0.0
        running.engine.gate.set()


def test_a_dense_model_has_no_experts(serve: Serve, make_model):
    running = serve(make_model(moe=None))
    assert running.get("/v1/console/state").json()["moe"] is None


def test_a_server_that_loads_answers_with_what_it_knows(serve: Serve):
    loading = threading.Event()
    running = serve(loading=loading)
    try:
        assert running.get("/v1/console/state").json()["phase"] == "loading"
        assert steps(running) == {"clock": 0.0, "last": 0, "requests": [], "steps": []}
    finally:
        loading.set()
