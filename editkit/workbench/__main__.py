"""The workbench: trace, choose, edit, look, undo, in a browser.

    python -m editkit.workbench                            # the bundled model; open the link that is shown
    python -m editkit.workbench --port 9000 model=gpt2-xl device=cuda
    python -m editkit.workbench --rebuild WORD --into edit.safetensors   # the edit of a page's state, without a page

Settings are model=NAME, device=NAME and dtype=NAME, as for editkit.run. The page is served to this machine alone; with
--host ADDRESS to others too, and then the link holds a random token.
"""

import argparse
import contextlib
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit import start
from editkit.commands import DTYPES, answered
from editkit.errors import ConfigError, OutputError, did_you_mean

if TYPE_CHECKING:
    from editkit.workbench.bench import Bench
    from editkit.workbench.guard import Guard

PORT = 8765
SETTINGS = {"model": "atlas", "device": "auto", "dtype": "float32"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = _parser().parse_args(arguments)
    return answered(lambda: _run(options), "the workbench is closed; no weight was changed for good")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m editkit.workbench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = ", ".join(f"{name}={value}" for name, value in SETTINGS.items())
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help=f"default: {defaults}")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen to; default: this machine alone")
    parser.add_argument("--folder", type=Path, help="keep edits here, so that links are restored from their files")
    parser.add_argument("--rebuild", metavar="WORD", help="make the edit of a state again, as a page shows the command")
    parser.add_argument("--into", type=Path, default=Path("edit.safetensors"), help="file for --rebuild")
    return parser


def _run(options: argparse.Namespace) -> int:
    settings = _settings(options.settings)
    if options.rebuild is None and (find_spec("starlette") is None or find_spec("uvicorn") is None):
        raise ConfigError('The page needs two packages more: pip install "editkit[workbench]".')
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port is {options.port}; it must be from 0 to 65535.")
    start.import_libraries()
    from editkit.models.load import load
    from editkit.workbench.bench import Bench

    with _folder(options.folder) as folder:
        bench = Bench(load(settings["model"], device=settings["device"], dtype=settings["dtype"]), folder)
        if options.rebuild is not None:
            return _rebuild(bench, options.rebuild, options.into)
        from editkit.workbench.guard import Guard

        return _serve(bench, Guard.of(options.host), options.port)


def _settings(given: list[str]) -> dict[str, str]:
    found = dict(SETTINGS)
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not value or name not in SETTINGS:
            raise ConfigError(f"'{each}' is no setting NAME=VALUE of the workbench: {did_you_mean(name, SETTINGS)}")
        found[name] = value
    if found["dtype"] not in DTYPES:
        raise ConfigError(f"dtype={found['dtype']}: {did_you_mean(found['dtype'], DTYPES)}")
    return found


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """The folder that was named, or a temporary one, which is deleted at the end."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="editkit-workbench-") as folder:
            yield Path(folder)
        return
    try:
        given.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder '{given}' cannot be made: {error.strerror}. Name another.") from error
    yield given


def _rebuild(bench: "Bench", word: str, into: Path) -> int:
    from editkit.workbench.desk import Desk
    from editkit.workbench.leaving import rebuild

    desk = Desk(bench)
    for note in rebuild(desk, word, lambda part: None):
        print(f"editkit: warning: {note}", file=sys.stderr)
    total = desk.total()
    if total is None:
        raise ConfigError("Nothing is in force in this state: there is no edit to write.")
    print(f"{total.save(into)}: digest {total.digest}")
    return 0


def _serve(bench: "Bench", guard: "Guard", port: int) -> int:
    import uvicorn

    from editkit.workbench.server import LONGEST, application

    listening = _listen(guard.host, port)
    shown = f"[{guard.host}]" if ":" in guard.host else guard.host
    link = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={guard.token}" if guard.token else "")

    def started() -> None:
        base = bench.base
        print(f"model   {base.name}, {base.dtype}, on {bench.lm.device}, digest {base.digest[:16]}")
        print(f"open    {link}", flush=True)
        if guard.token:
            print("Everyone with this link can use the model. It is not encrypted: use a network that you trust.")
        start.resume_collector()

    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    config = uvicorn.Config(application(bench, guard, started), ws="websockets-sansio", ws_max_size=LONGEST,
                            timeout_graceful_shutdown=1, **settings)  # fmt: skip
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError for an address or a port that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen()  # now, so that a browser that comes before the server is not refused, but waits
    except OSError as error:
        message = f"The workbench cannot listen to {host}, port {port}: {error.strerror}. Try --port 0."
        raise ConfigError(message) from error
    return found


if __name__ == "__main__":
    sys.exit(main())
