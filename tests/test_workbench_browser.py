"""The workbench in a real browser: from an empty page to an edit that is downloaded, and what must not happen.

Skipped where Playwright's Python package or a Chromium (that of Debian, or $EDITKIT_CHROMIUM) is missing.
"""

import http.server
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from editkit.edits import Edit
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Snapshot
from editkit.workbench.__main__ import _listen
from editkit.workbench.bench import Bench
from editkit.workbench.guard import Guard
from editkit.workbench.server import application

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright's Python package")
CHROMIUM = os.environ.get("EDITKIT_CHROMIUM") or shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs a Chromium: apt-get install chromium, or $EDITKIT_CHROMIUM", allow_module_level=True)

SLOW = 60_000  # milliseconds that a step may take, on a machine that does other work too
expect = playwright.expect


@pytest.fixture(scope="module")
def bench(atlas_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Snapshot.take(atlas_lm.model, [], everything=True):
        yield Bench(atlas_lm, tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def url(bench: Bench) -> Iterator[str]:
    import uvicorn

    ready, listening = threading.Event(), _listen("127.0.0.1", 0)
    config = uvicorn.Config(application(bench, Guard(), ready.set), log_level="warning", ws="websockets-sansio",
                            timeout_graceful_shutdown=1)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    assert ready.wait(20)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    found = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    found.set_default_timeout(SLOW)
    expect.set_options(timeout=SLOW)
    yield found
    found.close()


def opened(context: Any, url: str, *, traced: bool = True) -> Any:
    """A page, of which every error and every refusal by the content policy is a failure of the test."""
    page = context.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
    page.on("dialog", lambda dialog: page.wrong.append(f"dialog {dialog.message}"))
    page.goto(url)
    if traced:
        expect(page.locator("#kinds button")).to_have_count(3)
    return page


def edit(page: Any) -> None:
    page.click("#compute")
    page.click("text=Apply it")
    expect(page.locator("#rows .good").first).to_be_visible()
    expect(page.locator("#python")).to_contain_text("edit.save")


def digest(page: Any) -> str:
    return str(page.locator("#totals dd").first.get_attribute("title"))


def said_after(page: Any) -> str:
    return str(page.locator("#rows tr:not(.group) td:nth-child(3) .said").first.inner_text())


def downloaded(page: Any, what: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.click(f"[data-file={what}]")
    path = folder / str(waiting.value.suggested_filename)
    waiting.value.save_as(path)
    return path


def test_from_an_empty_page_to_an_edit_that_is_downloaded(context: Any, url: str, bench: Bench, tmp_path: Path) -> None:
    page = opened(context, url)
    # 1) Fact: searched by keyboard, asked.
    page.keyboard.press("/")
    page.keyboard.type("eiffel city")
    expect(page.locator("#found li").first).to_contain_text("The Eiffel Tower")
    page.keyboard.press("Enter")
    expect(page.locator("#new")).to_be_focused()
    page.keyboard.type("Rome")
    page.keyboard.press("Enter")
    expect(page.locator(".verdict")).to_contain_text("It knows this: it says “Paris”")
    # 2) Where: the map by keyboard; a cell sets the block and the token.
    cell = page.locator("#map td[tabindex='0']")
    cell.focus()
    place = [int(cell.get_attribute(f"data-{name}")) for name in ("token", "block")]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#map .readout")).to_contain_text(f"block {place[1] + 1}: P(Paris)")
    page.keyboard.press("Enter")
    expect(page.locator("#set-layer")).to_have_value(str(place[1] + 1))
    expect(page.locator("#set-fact_token")).to_have_value("subject_last")
    expect(page.locator("#map th.proposed")).to_have_count(1)
    expect(page.locator("#lens tbody tr")).to_have_count(bench.lm.layers + 1)
    page.select_option("#set-layer", "4")
    # 3) Edit: predicted first, then before and after; the slider asks again.
    page.keyboard.press("Control+Enter")
    expect(page.locator("#draft tbody tr:not(.group)")).not_to_have_count(0)
    expect(page.locator("#steps li.none")).to_be_visible()  # nothing is applied yet
    page.click("text=Apply it")
    expect(page.locator("#rows mark").first).to_contain_text("Rome")
    page.locator("#slide").fill("0.1")
    expect(page.locator("#rows tr:not(.group) td:nth-child(3) .said").first).to_contain_text("Paris")
    page.locator("#slide").fill("1")
    expect(page.locator("#rows mark").first).to_contain_text("Rome")
    page.fill("#free", "The Eiffel Tower can be visited in the city of")
    expect(page.locator("#free-after")).to_contain_text("Rome")
    expect(page.locator("#free-before")).to_contain_text("Paris")
    # 4) Audit: every fact a square; one that is edited; details on a click.
    page.click("#run-audit")
    expect(page.locator("#grid .square[data-row]")).to_have_count(len(bench.atlas.facts))
    page.locator("#grid .square.edited[data-row]").first.click()
    expect(page.locator("#fact-detail")).to_contain_text("Predicted: pull 1")
    # 5) Stack: off, on, undone, done again; the badge, the alarm.
    whole = digest(page)
    page.locator("#steps input[type=checkbox]").uncheck()
    expect(page.locator("#off-note")).to_be_visible()
    page.click("#undo")
    expect(page.locator("#off-note")).to_be_hidden()
    assert digest(page) == whole
    expect(page.locator("#badge")).to_contain_text("bit for bit")
    expect(page.locator("#badge code")).to_have_text(bench.base.digest[:12])
    expect(page.locator("#alarm")).to_contain_text("No sign of collapse")
    # 6) Leave with it: the file is the edit, the adapter has its files, the page its digest.
    path = downloaded(page, "edit", tmp_path)
    found, weights = Edit.load(path), page.locator("#totals dd").nth(2).get_attribute("title")
    assert found.digest == whole
    assert "layer" not in page.locator("#python").inner_text() or "layer=4" in page.locator("#python").inner_text()
    names = zipfile.ZipFile(downloaded(page, "peft", tmp_path)).namelist()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names)
    assert whole in downloaded(page, "page", tmp_path).read_text(encoding="utf-8")
    link = str(page.locator("#link").text_content())
    page.close()
    wait_until_left(bench)
    with found.applied(bench.lm):
        assert bench.lm.digest == weights
    # The link makes the same state, in another tab.
    other = opened(context, link)
    expect(other.locator("#steps .title")).to_have_text("The Eiffel Tower → Rome")
    assert digest(other) == whole and page.wrong == other.wrong == []


def wait_until_left(bench: Bench) -> None:
    """The worker has ended what it did for a page that is gone."""
    time.sleep(0.5)
    bench.verify()


def test_two_tabs_one_model(context: Any, url: str) -> None:
    one, other = opened(context, url), opened(context, url)
    edit(one)
    assert said_after(one).startswith("Rome")
    other.click("#ask")
    expect(other.locator(".verdict")).to_contain_text("It knows this: it says “Paris”")
    expect(one.locator(".verdict")).to_contain_text("It says the new answer, “Rome”")
    expect(other.locator("#steps li.none")).to_be_visible()
    # While one works, the other waits and is told; then it is answered.
    one.click("#run-audit")
    expect(one.locator("#status")).to_contain_text("asking every fact")
    other.click("#trace")
    expect(other.locator("#status")).to_contain_text("Waiting: 1 job is first; another page uses the model")
    one.keyboard.press("Escape")
    expect(one.locator("#error")).to_contain_text("Stopped: asking every fact. The model is as it was.")
    expect(other.locator("#status")).to_be_hidden()
    expect(other.locator("#badge")).to_contain_text("bit for bit")
    assert one.wrong == other.wrong == []


def test_a_tab_that_is_killed_leaves_the_model_as_it_was(context: Any, url: str, bench: Bench) -> None:
    one, other = opened(context, url), opened(context, url)
    edit(one)
    one.click("#run-audit")
    expect(one.locator("#status")).to_contain_text("asking every fact")
    one.close()
    other.click("#ask")
    expect(other.locator(".verdict")).to_contain_text("It knows this: it says “Paris”")
    expect(other.locator("#badge code")).to_have_text(bench.base.digest[:12])
    wait_until_left(bench)


def test_a_script_in_a_subject_is_text(context: Any, url: str) -> None:
    page = opened(context, url)
    evil = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
    page.fill("#prompt", f"{evil} is located in the city of")
    page.fill("#subject", evil)
    page.fill("#true", "")
    page.fill("#new", "<b>Rome</b>")
    page.click("#ask")
    expect(page.locator("#answer")).to_contain_text("<script>")
    page.click("#trace")
    expect(page.locator("#map th.subject").first).to_be_visible()
    page.select_option("#method", "ft_l")  # need not wait for the trace, which Esc ends
    page.keyboard.press("Escape")
    expect(page.locator("#about-method")).to_contain_text("held within")
    page.click("#compute")
    page.click("text=Apply it")
    expect(page.locator("#steps .title")).to_contain_text("<script>")
    expect(page.locator("#python")).to_contain_text("edit.save")
    page.reload()  # and from the link
    expect(page.locator("#steps .title")).to_contain_text("<script>")
    assert (
        page.evaluate("window.hacked") is None and page.locator("#steps img, #answer img, b:text('Rome')").count() == 0
    )
    assert page.wrong == []


OPENS = """(at) => new Promise((end) => {
    const socket = new WebSocket(at); socket.onopen = () => end("open"); socket.onclose = () => end("refused"); })"""
FRAMES = """(at) => new Promise((end) => {
    const frame = document.createElement("iframe");
    frame.onload = () => { try { end(frame.contentDocument ? "same" : "closed"); } catch { end("closed"); } };
    frame.src = at; document.body.append(frame); })"""


def test_another_origin_reaches_nothing(context: Any, url: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>another site</p>", encoding="utf-8")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        ended = page.evaluate(OPENS, url.replace("http", "ws") + "socket")
        read = page.evaluate("(at) => fetch(at).then(() => 'read', () => 'refused')", url)
        framed = page.evaluate(FRAMES, url)
        server.shutdown()
    assert (ended, read, framed) == ("refused", "refused", "closed")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_narrow_page_scrolls_in_one_direction(browser: Any, url: str, theme: str) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800}, color_scheme=theme)
    context.set_default_timeout(SLOW)
    page = opened(context, url)
    edit(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400 and page.wrong == []
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != colour
    context.close()


def test_every_control_has_a_name(context: Any, url: str) -> None:
    page = opened(context, url)
    edit(page)
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, [role=grid]')]"
        ".filter((e) => e.offsetParent && !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))"
        ".map((e) => e.outerHTML)"
    )
    assert nameless == []
    assert re.search("lang=.en", page.content()) and page.wrong == []
