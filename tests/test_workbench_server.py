"""The workbench's server, its worker and its guard: who may connect, who waits, what is refused."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from editkit.edits import Edit
from editkit.errors import ConfigError, EditkitError, ReversalError
from editkit.progress import Bar
from editkit.testing.tiny import tiny_lm
from editkit.workbench import __main__ as command
from editkit.workbench.bench import Bench, Verified
from editkit.workbench.guard import Guard
from editkit.workbench.server import application
from editkit.workbench.worker import MOST, Job, Worker
from tests.test_workbench import QUICK, TOWER

HERE = "http://127.0.0.1:8765"
OURS = {"origin": HERE}
SOCKET = "ws://127.0.0.1:8765/socket"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tiny_lm("gpt2"), tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(bench: Bench) -> Iterator[TestClient]:
    with TestClient(application(bench, Guard()), base_url=HERE) as client:
        yield client


class Page:
    """What a page does with its socket."""

    def __init__(self, socket: WebSocketTestSession) -> None:
        self.socket, self.number, self.badges = socket, 0, list[dict[str, Any]]()

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        """The last word on a request: done, error, stopped or skipped."""
        self.number += 1
        self.socket.send_json({"id": self.number, "do": request, **fields})
        return self.end(self.number)

    def end(self, number: int) -> dict[str, Any]:
        while True:
            said = self.socket.receive_json()
            if said["kind"] == "badge":
                self.badges.append(said)
            elif said.get("id", number) == number and said["kind"] in ("done", "error", "stopped", "skipped"):
                return dict(said)


def test_the_page_and_its_files(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert "<script>" not in page.text and " onclick" not in page.text and "http" not in page.text
    for name in ("main.js", "style.css", "icon.svg"):
        assert client.get(f"/static/{name}").status_code == 200
    for name in ("..%2f__main__.py", "../__main__.py", "nothing.js", "%2fetc%2fpasswd", "__init__.py"):
        assert client.get(f"/static/{name}").status_code in (403, 404)
    assert client.get("/files/anything").status_code == 404


def test_no_script_or_style_is_fetched_from_elsewhere() -> None:
    static = Path(command.__file__).parent / "static"
    for path in static.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text, path.name


def test_two_pages_do_not_see_each_other(client: TestClient, bench: Bench) -> None:
    with client.websocket_connect(SOCKET, headers=OURS) as a, client.websocket_connect(SOCKET, headers=OURS) as b:
        one, other = Page(a), Page(b)
        before = other.ask("ask", **TOWER)["value"]["next"]
        one.ask("compute", **QUICK | {"settings": {"steps": 8}}, **TOWER)
        applied = one.ask("apply", strength=4.0)["value"]
        assert one.ask("ask", **TOWER)["value"]["next"] != before == other.ask("ask", **TOWER)["value"]["next"]
        assert other.ask("look")["value"]["stack"]["steps"] == []
        # A file that one page was offered: the word is enough for it, and it goes when the page does.
        file = one.ask("file", what="edit")["value"]
        fetched = client.get(f"/files/{file['word']}")
        (bench.folder / "fetched").write_bytes(fetched.content)
        assert Edit.load(bench.folder / "fetched").digest == file["digest"] == applied["stack"]["total"]
        assert all(badge["equal"] and badge["digest"] == bench.base.digest for badge in one.badges) and one.badges
    with client.websocket_connect(SOCKET, headers=OURS) as c:
        assert Page(c).ask("look")["kind"] == "done"  # after the two have left
    assert client.get(f"/files/{file['word']}").status_code == 404
    bench.verify()


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"do": "ask"}', '{"id": "x", "do": "ask"}', "[" * 100_000])
def test_a_message_that_cannot_be_read_is_one_error(client: TestClient, text: str) -> None:
    with client.websocket_connect(SOCKET, headers=OURS) as socket:
        socket.send_text(text)
        assert "cannot read" in socket.receive_json()["text"]
        assert "did you mean 'rome'" in Page(socket).ask("method", name="rmoe")["text"]
        assert Page(socket).ask("nonsense")["text"].startswith("The workbench does not know the request")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://evil.example", "host": "evil.example"},
        OURS | {"sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
def test_a_page_of_another_origin_gets_no_socket(client: TestClient, headers: dict[str, str]) -> None:
    with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect(SOCKET, headers=headers):
        pass
    assert refused.value.code == 4403
    host = {"host": "evil.example"}
    assert client.get("/", headers=host).status_code == client.get("/static/main.js", headers=host).status_code == 403
    assert client.get("/files/x", headers={"origin": "http://evil.example"}).status_code == 403


def test_another_host_needs_the_token(bench: Bench) -> None:
    guard = Guard.of("0.0.0.0")
    assert len(guard.token) >= 32 and guard.token != Guard.of("0.0.0.0").token and Guard.of("localhost").token == ""
    base, elsewhere = "http://lab.example:8765", "ws://lab.example:8765/socket"
    with TestClient(application(bench, guard), base_url=base) as client:
        assert client.get("/").status_code == 403 and client.get("/?token=wrong").status_code == 403
        assert client.get(f"/?token={guard.token}").status_code == 200
        assert client.get("/files/x").status_code == 403
        with suppress(WebSocketDisconnect), client.websocket_connect(elsewhere, headers={"origin": base}):
            pytest.fail("a socket without the token")
        with client.websocket_connect(f"{elsewhere}?token={guard.token}", headers={"origin": base}) as socket:
            assert Page(socket).ask("search", text="paris")["kind"] == "done"


# --- the worker ---------------------------------------------------------------------------------------------------


class Pretended(SimpleNamespace):
    """A bench whose model is `equal`, or not."""

    small, equal = True, True

    def verify(self) -> Verified:
        if not self.equal:
            raise ReversalError("not as it was")
        return Verified(True, "d" * 64, 1, 1)


Heard = list[dict[str, Any]]


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker(Pretended())  # type: ignore[arg-type]
    yield found
    found.close()


def job(tab: object, number: int, heard: Heard, work: Callable[[Any], Any], **more: Any) -> Job:
    return Job(tab, number, more.pop("name", "work"), work, heard.append, **more)


def wait_for(heard: Heard, kind: str, number: int) -> dict[str, Any]:
    for _ in range(500):
        for said in list(heard):
            if said["kind"] == kind and said.get("id") == number:
                return said
        threading.Event().wait(0.01)
    raise AssertionError(f"{kind} of {number} was never said: {heard}")


def test_the_second_waits_is_told_and_a_stop_ends_the_first(worker: Worker) -> None:
    heard: Heard = []

    def long(tell: Any) -> dict[str, Any]:
        for _ in Bar(range(10_000), desc="long work", disable=True):
            threading.Event().wait(0.01)
        return {}

    worker.submit(job("a", 1, heard, long))
    assert wait_for(heard, "progress", 1)["what"] == "long work"
    worker.submit(job("b", 2, heard, lambda tell: {"answer": 42}))
    assert wait_for(heard, "waiting", 2) == {"id": 2, "kind": "waiting", "place": 1, "other": True}
    # A newer one of the same name takes the place of one that waits.
    for number in (3, 4):
        worker.submit(job("a", number, heard, lambda tell: {}, name="slider", latest=True))
    wait_for(heard, "skipped", 3)
    worker.stop("a")
    wait_for(heard, "stopped", 1)
    wait_for(heard, "stopped", 4)
    assert wait_for(heard, "done", 2)["value"] == {"answer": 42}


def test_too_many_of_one_page_are_refused(worker: Worker) -> None:
    heard, go_on = Heard(), threading.Event()
    worker.submit(job("a", 0, heard, lambda tell: {"waited": go_on.wait(20)}))
    wait_for(heard, "started", 0)
    for number in range(MOST):
        worker.submit(job("a", 1 + number, heard, lambda tell: {}))
    with pytest.raises(EditkitError, match="are waiting"):
        worker.submit(job("a", 99, heard, lambda tell: {}))
    worker.submit(job("b", 100, heard, lambda tell: {}))  # another page may
    go_on.set()
    wait_for(heard, "done", 100)


def test_a_defect_is_no_traceback_and_a_changed_model_answers_nothing(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: Heard = []

    def broken(tell: Any) -> dict[str, Any]:
        raise KeyError("inside")

    worker.submit(job("a", 1, heard, broken))
    assert "KeyError inside the workbench" in wait_for(heard, "error", 1)["text"]
    worker.bench.equal = False  # type: ignore[attr-defined]
    worker.submit(job("a", 2, heard, lambda tell: {}))
    worker.submit(job("a", 3, heard, lambda tell: {}))
    assert wait_for(heard, "error", 3)["text"] == "not as it was"
    assert "Traceback" in capsys.readouterr().err


def test_a_large_model_is_compared_when_nobody_waits(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editkit.workbench.worker.IDLE", 0.05)
    worker.bench.small, worker.bench.base = False, SimpleNamespace(digest="d" * 64)  # type: ignore[assignment]
    heard: Heard = []
    worker.submit(job("a", 1, heard, lambda tell: {}))
    badges = list[Any]()
    for _ in range(500):
        badges = [said["equal"] for said in heard if said["kind"] == "badge"]
        if len(badges) == 2:
            break
        threading.Event().wait(0.01)
    assert badges == [None, True]


# --- the command --------------------------------------------------------------------------------------------------


def refuses(says: str) -> AbstractContextManager[Any]:
    return pytest.raises(ConfigError, match=says)


def test_wrong_settings_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for given, says in (
        (["modle=atlas"], "did you mean 'model'"),
        (["gpt2"], "is no setting NAME=VALUE"),
        (["dtype=float23"], "did you mean 'float32'"),
        (["--port", "99999"], "from 0 to 65535"),
    ):
        assert command.main(given) == 2
        said = capsys.readouterr().err
        assert says in said and said.startswith("editkit: ") and said.count("\n") == 1
    with refuses("cannot listen"):
        command._listen("256.0.0.1", 80)
    with command._folder(None) as folder:
        assert folder.is_dir()
    assert not folder.exists()
    with command._folder(tmp_path / "kept") as kept:
        pass
    assert kept.is_dir()
