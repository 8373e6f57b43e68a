"""edit.push_to_hub and Edit.from_hub, against a small real server that speaks what of the Hub's API they use."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from editkit import Edit
from editkit.errors import EditFileError, EditkitError
from editkit.testing.tiny import tiny_lm
from tests.test_peft import edit_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: create, preupload, commit, resolve."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self.files.setdefault(f"me/{name}", {})
            self._send(json.dumps({"url": f"https://huggingface.co/me/{name}", "id": f"me/{name}"}).encode())
        elif "/preupload/" in self.path:
            paths = [each["path"] for each in json.loads(body)["files"]]
            found = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._send(json.dumps({"files": found}).encode())
        elif "/commit/" in self.path:
            repo = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"https://huggingface.co/{repo}/commit/{COMMIT}"
            self._send(json.dumps({"commitUrl": url, "commitOid": COMMIT, "success": True}).encode())
        else:
            self._send(b"{}")

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        repo, name = "/".join(parts[:2]), parts[-1]
        if len(parts) == 5 and parts[2] == "resolve" and name in self.files.get(repo, {}):
            data = self.files[repo][name]
            self._send(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
        elif parts[:2] == ["api", "models"]:
            self._send(json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}).encode())
        else:
            self._send(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    Hub.files, Hub.asked = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "of-a-test")
        yield Hub
        running.shutdown()


RECORD = {
    "task": "edit",
    "scores": [
        {"metric": "counterfact.ES", "when": "before", "value": 0.0},
        {"metric": "counterfact.ES", "when": "after", "value": 1.0},
    ],
    "environment": {"commit": "abc"},
}


def test_there_and_back_it_is_the_same_edit(server: type[Hub]) -> None:
    lm = tiny_lm("gpt2")
    edit = edit_of(lm)
    commit = edit.push_to_hub("me/rome", licence="mit", record=RECORD)
    assert commit == COMMIT and set(server.files["me/rome"]) == {"edit.safetensors", "README.md"}
    again = Edit.from_hub("me/rome", commit)
    assert again.to_bytes() == edit.to_bytes()
    with again.applied(lm):
        pass
    card = server.files["me/rome"]["README.md"].decode()
    assert card.startswith('---\nbase_model: "tiny-gpt2"\nlicense: "mit"\n') and edit.digest in card
    assert "| counterfact.ES | 0.000 | 1.000 | 1 |" in card and "The Eiffel Tower is in → Rome" in card


def test_what_the_hub_does_not_have_is_one_error(server: type[Hub]) -> None:
    with pytest.raises(EditkitError, match=r"'me/none' at v1 could not be read: .*Check the name"):
        Edit.from_hub("me/none", "v1")
    with pytest.raises(EditkitError, match="'not a name' could not be written"):
        edit_of(tiny_lm("gpt2")).push_to_hub("not a name")


def test_a_damaged_file_is_refused(server: type[Hub]) -> None:
    data = edit_of(tiny_lm("gpt2")).to_bytes()
    server.files["me/half"] = {"edit.safetensors": data[:-40]}
    with pytest.raises(EditFileError):
        Edit.from_hub("me/half", COMMIT)
