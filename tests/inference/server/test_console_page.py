"""The console in a browser: Debian's Chromium, headless, over real HTTP."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from turnout.tests.helpers.waiting import eventually

from .conftest import Running, Serve

CHROMIUM = Path("/usr/bin/chromium")
WIDTHS = {1400: 1000, 400: 850}  # pixels, and the height that goes with them
COLORS = """canvas => {
    const { width, height } = canvas;
    const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const pixels = new Uint32Array(copy.getImageData(0, 0, width, height).data.buffer);
    const found = new Map();
    for (const pixel of pixels) if (pixel) found.set(pixel, (found.get(pixel) ?? 0) + 1);
    return [...found.values()].filter(n => n > 20).length;
}"""
"""How many colours a canvas has in more than some pixels."""
DRAWN = """async (canvas, color) => {
    const { Theme } = await import("/console/color.js");
    const { width, height } = canvas;
    const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    copy.fillStyle = new Theme([color])[color];
    copy.fillRect(0, 0, 1, 1);
    const wanted = copy.getImageData(0, 0, 1, 1).data;
    copy.clearRect(0, 0, 1, 1);
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, width, height);
    let found = 0;
    for (let i = 0; i < data.length; i += 4) {
        found += data[i + 3] > 127 && [0, 1, 2].every(k => Math.abs(data[i + k] - wanted[k]) < 24);
    }
    return found;
}"""
"""How many pixels of a canvas have a colour of the theme: a median of one second is a dot, and has some."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing: apt-get update && apt-get install -y chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Pages on a running server. Nothing may go wrong on them, and they ask nobody else."""
    pages: list[tuple[Page, str, list[str]]] = []

    def start(running: Running, width: int = 1400, scheme: Any = "dark", ready: bool = True) -> Page:
        page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]}, color_scheme=scheme)
        page.set_default_timeout(20_000)
        wrong: list[str] = []
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"{request.url}: {request.failure}"))
        page.on("request", lambda request: request.url.startswith(running.url) or wrong.append(request.url))
        pages.append((page, running.url, wrong))
        page.goto(running.url)
        if ready:
            expect(page.locator("#phase")).to_have_text("ready")
        return page

    yield start
    for page, _, wrong in pages:
        page.close()
        assert not [text for text in wrong if "ERR_ABORTED" not in text], wrong


@contextmanager
def load(running: Running, requests: int = 6, tokens: int = 60) -> Iterator[None]:
    """Requests beside the page's."""

    def post(i: int) -> None:
        running.post(prompt=[7 + i] * (10 + 9 * i), max_tokens=tokens, ignore_eos=True)

    threads = [threading.Thread(target=post, args=(i,)) for i in range(requests)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


def colored(page: Page, name: str, colors: int) -> None:
    """Wait until a canvas has so many colours."""
    assert eventually(lambda: page.wait_for_timeout(50) or page.locator(f"#{name}").evaluate(COLORS) >= colors), name


def drawn(page: Page, name: str, color: str) -> None:
    """Wait until a chart shows a line or a dot in a colour of the theme."""
    chart = page.locator(f"#{name}")
    assert eventually(lambda: page.wait_for_timeout(50) or chart.evaluate(DRAWN, color) >= 4), name


def send(page: Page, words: str = "The import statement", **settings: str) -> None:
    for name, value in settings.items():
        page.locator(f"#set-{name}").evaluate("(input, value) => { input.value = value; }", value)
    page.fill("#prompt", words)
    page.keyboard.press("Control+Enter")


def test_a_chat_streams_with_probabilities_alternatives_and_experts(served: Running, open_page):
    page = open_page(served)
    send(page, max_tokens="12", seed="1")
    stats = page.locator(".stats")
    expect(stats).to_contain_text("length")
    expect(stats).to_contain_text("12 tokens")
    expect(stats).to_contain_text("tokens/s")
    tokens = page.locator(".token")
    assert tokens.count() == 12
    assert tokens.first.evaluate("token => getComputedStyle(token).backgroundColor") != "rgba(0, 0, 0, 0)"
    tokens.nth(3).hover()
    tip = page.locator("#tip")
    expect(tip).to_contain_text("probability")
    assert tip.locator(".bar").count() == 5
    page.locator("input[value=experts] + span").click()
    expect(page.locator("#layer-name")).to_have_text("1")
    assert "gradient" in tokens.nth(3).evaluate("token => getComputedStyle(token).backgroundImage")
    assert tokens.nth(11).evaluate("token => getComputedStyle(token).backgroundImage") == "none"
    messages = [{"role": "user", "content": "The import statement"}]
    fields = {"messages": messages, "max_tokens": 12, "seed": 1, "routed_experts": True}
    answer = served.post("/v1/chat/completions", **fields).json()
    rows = answer["choices"][0]["routed_experts"][answer["usage"]["prompt_tokens"] :]
    page.locator(".made").focus()
    told = []
    for _ in range(12):
        page.keyboard.press("ArrowRight")
        told.append(tip.locator("div", has_text="experts").first.inner_text().split("\n")[-1])
    assert told == [*(str(row[0][0]) for row in rows), "not computed: it is the last"]
    send(page, "and then?", max_tokens="3", n="2")
    expect(page.locator(".stats").nth(1)).to_contain_text("6 tokens")


def test_the_charts_move_the_timeline_and_the_heat_map_fill(served: Running, open_page, monkeypatch):
    monkeypatch.setattr(served.engine, "pace", 0.01)
    page = open_page(served)
    with page.expect_response("**/v1/console/steps?*"):
        pass  # from now on the engine keeps its steps
    before = {name: page.locator(f"#{name}").evaluate("c => c.toDataURL()") for name in ("ttft", "flow", "timeline")}
    with load(served):
        expect(page.locator("#flow-now")).not_to_have_text("0")
        colored(page, "timeline", 5)
    expect(page.locator("#tpot-now")).to_contain_text("ms")
    colored(page, "heat", 6)
    colored(page, "kv", 2)
    for name, color in {"ttft": "first", "tpot": "gap", "flow": "decode", "queue": "decode"}.items():
        drawn(page, name, color)
    for name, picture in before.items():
        assert page.locator(f"#{name}").evaluate("c => c.toDataURL()") != picture, name
    for name, words in {"timeline": "step", "heat": "× the mean", "kv": "block", "flow": "decode, tokens/s"}.items():
        page.locator(f"#{name}").focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowDown")
        expect(page.locator("#tip")).to_contain_text(words)
        expect(page.locator("#voice")).to_contain_text(words)


STEPS = """async () => {
    const { Live } = await import("/console/live.js");
    const live = new Live();
    const step = (number, shares, preempted = []) =>
        ({ number, start: number - 1, seconds: 0.5, tokens: 1, running: 1, waiting: 0, preempted, shares });
    const take = (last, ...steps) =>
        live.take({ clock: 9, last, requests: [...requests], steps });
    const requests = [["a", 0.25, 4, 1.5], ["b", 0, 2, 0.5], ["c", 1, 2, 2.5], ["d", 1, 2, 3.5]];
    const lanes = () => live.steps.map(({ cells }) => cells.map(({ request, lane }) => request.id + lane).join(" "));
    const kept = name => [...live.seconds].sort(([a], [b]) => a - b).flatMap(([, second]) => second[name]);
    take(4,
        step(1, [0, 0, 3, 0, 1, 0, 2, 2]),
        step(2, [0, 3, 1, 2, 1, 2, 1, 1]),
        step(3, [0, 4, 1, 1, 2, 0, 2, 2]),
        step(4, [0, 5, 1, 1, 3, 0, 2, 2], [2]));
    const found = { lanes: lanes(), ttft: kept("ttft"), gaps: kept("gaps"), tokens: kept("tokens") };
    requests.push(["e", 5, 2, 7.5], ["f", 5, 2, 0]);
    take(9, step(9, [0, 6, 1, 1, 4, 3, 1, 1, 5, 0, 1, 0]));
    const [gap, late] = [kept("gaps").length, kept("ttft").at(-1)];
    const again = take(1, step(1, [1, 0, 2, 2]));
    return { ...found, gap, late, again: again.length, after: lanes() };
}"""


def test_times_and_rows_follow_from_the_steps(served: Running, open_page):
    page = open_page(served)
    found = page.evaluate(STEPS)
    # b has ended when c comes and gets its row; c is preempted and keeps it, so d opens another
    assert found["lanes"] == ["a0 b1", "a0 b1", "a0 c1", "a0 d2 c1"]
    assert found["ttft"] == [0.5, 1.25, 1.5, 2.5]
    assert found["gaps"] == [1, 1, 1]
    assert found["tokens"] == [1, 2, 2, 2]
    assert found["gap"] == 3, "no time is told over steps that are missing"
    assert found["late"] == 2.5, "of a request whose first step is missing"
    assert (found["again"], found["after"]) == (1, ["b0"]), "another server begins anew"


def test_everything_can_be_done_with_keys(served: Running, open_page, monkeypatch):
    monkeypatch.setattr(served.engine, "pace", 0.02)
    page = open_page(served)
    page.keyboard.press("/")
    page.keyboard.type("The /import t p 1")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token").nth(3)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".stats")).to_contain_text("stopped")
    expect(page.locator("#stop")).to_be_disabled()
    page.locator(".made").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_contain_text("probability")
    expect(page.locator("#voice")).to_contain_text("probability")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.keyboard.press("p")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("1")
    expect(page.locator("input[value=plain]")).to_be_checked()
    page.keyboard.press("?")
    expect(page.locator("#help-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    names = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, select, canvas, [tabindex=\"0\"]')]"
        ".filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.title)).map(e => e.outerHTML)"
    )
    assert names == []


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (400, "dark"),
        *(pytest.param(*form, marks=pytest.mark.full) for form in ((400, "light"), (1400, "dark"), (1400, "light"))),
    ],
)
def test_nothing_is_wider_than_the_window(served: Running, open_page, width, scheme):
    page = open_page(served, width, scheme)
    expect(page.locator("#kv-note")).to_contain_text("blocks of 16 tokens")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = page.evaluate("[...document.querySelectorAll('.card')].map(card => card.clientWidth)")
    assert len(widths) == 8
    assert min(widths) > 180


@pytest.mark.full
def test_the_key_is_asked_for_and_kept_in_the_tab(serve: Serve, browser: Browser):
    running = serve(server={"api_key": "secret"})
    page = browser.new_page()
    page.goto(running.url)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    for key in ("wrong", "secret"):
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", key)
        page.keyboard.press("Enter")
    expect(page.locator("#phase")).to_have_text("ready")
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    page.reload()
    expect(page.locator("#phase")).to_have_text("ready")
    page.close()


@pytest.mark.full
def test_a_dense_model_says_so(serve: Serve, make_model, open_page):
    page = open_page(serve(make_model(moe=None)))
    expect(page.locator("#dense")).to_be_visible()
    send(page, max_tokens="4")
    expect(page.locator(".stats")).to_contain_text("4 tokens")
    page.locator("#timeline").focus()
    page.keyboard.press("3")
    expect(page.locator("#legend")).to_contain_text("dense")


@pytest.mark.full
def test_hundreds_of_requests_are_drawn(serve: Serve, open_page):
    running = serve(max_num_seqs=320, num_blocks=2000, max_num_batched_tokens=640)
    running.engine.pace = 0.05
    page = open_page(running)
    prompts = [[i + 1] * 20 for i in range(300)]
    thread = threading.Thread(target=running.post, kwargs={"prompt": prompts, "max_tokens": 60, "ignore_eos": True})
    thread.start()
    expect(page.locator("#queue-now")).to_have_text("300")
    colored(page, "timeline", 5)
    thread.join()
    expect(page.locator("#queue-now")).to_have_text("0")


@pytest.mark.full
def test_what_the_server_refuses_is_said(served: Running, browser: Browser):
    page = browser.new_page()
    page.goto(served.url)
    expect(page.locator("#phase")).to_have_text("ready")
    send(page, temperature="9")
    expect(page.locator(".error[role=alert]")).to_contain_text("temperature")
    expect(page.locator(".stats")).to_have_text("no answer")
    send(page, temperature="", logit_bias="{")
    expect(page.locator(".error[role=alert]").nth(1)).to_contain_text("logit_bias must be JSON")
    send(page, logit_bias="", max_tokens="3")
    expect(page.locator(".stats").nth(1)).to_contain_text("3 tokens")
    page.close()


@pytest.mark.full
def test_the_completion_endpoint_has_its_settings(served: Running, open_page):
    page = open_page(served)
    page.locator("input[value=complete] + span").click()
    send(
        page,
        max_tokens="5",
        **{"stop_token_ids": "1, 2"},
        logit_bias='{"7": 1.5}',
        bad_words="never",
        top_k="40",
        stop="\n\n\n",
    )
    expect(page.locator(".stats")).to_contain_text("5 tokens")
    expect(page.locator(".prompt")).to_have_text("The import statement")
    page.locator("#set-echo").evaluate("box => { box.checked = true; }")
    send(page, max_tokens="2", stop="", shape="choice", shape_text="yes\nno")
    expect(page.locator(".tokens").nth(1)).to_contain_text("The import statement")
    page.locator("input[value=experts] + span").click()
    painted = "tokens => tokens.filter(token => token.style.background !== '').length"
    shown = page.locator(".tokens").nth(1).locator(".token")
    assert shown.evaluate_all(painted) == shown.count() - 1
