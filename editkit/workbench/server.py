"""Server: the page, one socket a tab, downloads. A socket that closes is how a tab is known to be gone."""

import asyncio
import contextlib
import importlib.resources
import json
import math
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from editkit.errors import EditkitError
from editkit.workbench.bench import Bench
from editkit.workbench.desk import Desk
from editkit.workbench.guard import HEADERS, Guard
from editkit.workbench.handlers import AT_ONCE, LATEST, answer
from editkit.workbench.worker import Job, Worker, defect

LONGEST = 1 << 18  # bytes of a message
TABS = 32
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FULL, REFUSED = 4429, 4403  # codes of a socket that is closed


def application(bench: Bench, guard: Guard, started: Callable[[], None] = lambda: None) -> Starlette:
    """The workbench as an ASGI application. `started` is called when it is ready."""
    return Starlette(
        routes=[
            Route("/", partial(_page, guard)),
            Route("/static/{name}", partial(_static, guard)),
            Route("/files/{word}", partial(_download, bench, guard)),
            WebSocketRoute("/socket", partial(_socket, guard)),
        ],
        lifespan=partial(_life, bench, started),
    )


@contextlib.asynccontextmanager
async def _life(bench: Bench, started: Callable[[], None], app: Starlette) -> AsyncIterator[None]:
    app.state.worker, app.state.tabs = Worker(bench), set()
    started()
    try:
        yield
    finally:
        await asyncio.to_thread(app.state.worker.close)


# --- pages and files ----------------------------------------------------------------------------------------------


async def _page(guard: Guard, request: Request) -> Response:
    if not guard.host_is_ours(request.headers.get("host")):
        return _refused("This name does not lead to the workbench. Open the link that the terminal shows.")
    if not guard.token_is_ours(request.query_params.get("token")):
        return _refused("The link is not complete: it needs the token that the terminal shows.")
    return _file("index.html")


async def _static(guard: Guard, request: Request) -> Response:
    if not guard.host_is_ours(request.headers.get("host")):
        return _refused("This name does not lead to the workbench.")
    return _file(request.path_params["name"])


def _file(name: str) -> Response:
    """A file of static/, by its very name."""
    files = {each.name: each for each in importlib.resources.files("editkit.workbench").joinpath("static").iterdir()}
    kind = KINDS.get(name[name.rfind(".") :])
    if name not in files or kind is None:
        return PlainTextResponse("There is no such file.", 404, headers=HEADERS)
    return Response(files[name].read_bytes(), headers=HEADERS, media_type=kind)


async def _download(bench: Bench, guard: Guard, request: Request) -> Response:
    if not _is_ours(guard, request, origin=False):
        return _refused("This file is for the workbench's own page.")
    found = bench.offered(request.path_params["word"])
    if found is None or not found[0].is_file():
        return PlainTextResponse("This file is gone. Ask the page for it again.", 404, headers=HEADERS)
    path, name = found
    return FileResponse(path, filename=name, media_type="application/octet-stream", headers=HEADERS)


def _is_ours(guard: Guard, connection: HTTPConnection, *, origin: bool) -> bool:
    """Whether a request is of our own page. A browser names the origin of a socket always, of a download often."""
    host, said = connection.headers.get("host"), connection.headers.get("origin")
    good = guard.origin_is_ours(said, host) if origin or said is not None else guard.host_is_ours(host)
    site = connection.headers.get("sec-fetch-site", "same-origin")
    return good and site in ("same-origin", "none") and guard.token_is_ours(connection.query_params.get("token"))


def _refused(text: str) -> Response:
    return PlainTextResponse(text, 403, headers=HEADERS)


# --- the socket ---------------------------------------------------------------------------------------------------


async def _socket(guard: Guard, socket: WebSocket) -> None:
    if not _is_ours(guard, socket, origin=True):
        await socket.close(REFUSED)  # before it is accepted: the browser gets a 403
        return
    await socket.accept()
    worker, tabs = socket.app.state.worker, socket.app.state.tabs
    if len(tabs) >= TABS:
        await socket.close(FULL, f"{TABS} pages are open; close one")
        return
    desk, out, loop = Desk(worker.bench), asyncio.Queue[dict[str, Any]](), asyncio.get_running_loop()
    tabs.add(desk)

    def send(said: dict[str, Any]) -> None:
        """From the worker's thread, or this one."""
        with contextlib.suppress(RuntimeError):  # the server is at its end
            loop.call_soon_threadsafe(out.put_nowait, said)

    sender = asyncio.create_task(_send(socket, out))
    try:
        while True:
            _take(await socket.receive_text(), worker, desk, send)
    except (WebSocketDisconnect, KeyError):  # KeyError: bytes in place of text
        pass
    finally:
        tabs.discard(desk)
        worker.leave(desk, desk.leave)
        sender.cancel()


async def _send(socket: WebSocket, out: asyncio.Queue[dict[str, Any]]) -> None:
    while True:
        text = json.dumps(_finite(await out.get()), ensure_ascii=False)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the page is gone; the receiver ends this task
            await socket.send_text(text)


def _finite(value: Any) -> Any:
    """The value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _take(text: str, worker: Worker, desk: Desk, send: Callable[[dict[str, Any]], None]) -> None:
    """One message of a page: a job for the worker, or the word to stop."""
    try:
        message = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        message = None
    number = message.get("id") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(number, int):
        send({"kind": "error", "text": "The workbench got a message that it cannot read. Reload the page."})
        return
    name = str(message.get("do"))
    if name == "stop":
        worker.stop(desk)
        return
    if name in AT_ONCE:
        try:
            send({"id": number, "kind": "done", "value": answer(desk, message, lambda part: None), "notes": []})
        except EditkitError as error:
            send({"id": number, "kind": "error", "text": str(error)})
        except Exception as error:
            send({"id": number, "kind": "error", "text": defect(error)})
        return
    job = Job(desk, number, name, partial(answer, desk, message), send, latest=name in LATEST)
    try:
        worker.submit(job)
    except EditkitError as error:
        job.say("error", text=str(error))
