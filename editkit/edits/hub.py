"""An edit on the Hugging Face Hub: a repository with edit.safetensors and a card. No Edit is known here.

The Hub is asked at $HF_ENDPOINT, else at huggingface.co, with the token that `hf auth login` keeps or $HF_TOKEN.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editkit.errors import EditkitError

FILE, CARD = "edit.safetensors", "README.md"
TAG = "editkit-edit"  # of repositories that hold one


def push(files: Mapping[str, bytes], repo: str, *, private: bool, message: str) -> str:
    """Upload files by name to a repository, which is made where it is missing; the commit that holds them.

    Raises EditkitError where the Hub does not take them.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with tempfile.TemporaryDirectory() as folder, _explained(f"'{repo}' could not be written"):
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).oid)


def pull(repo: str, revision: str) -> Path:
    """The edit's file of a repository at a revision, from the cache of huggingface_hub where it is there.

    Raises EditkitError where there is none.
    """
    from huggingface_hub import hf_hub_download

    with _explained(f"'{repo}' at {revision} could not be read"):
        found = hf_hub_download(repo, FILE, revision=revision, endpoint=os.environ.get("HF_ENDPOINT"))
        return Path(str(found))


class _explained:
    """Errors of the Hub and of the network as one EditkitError that begins with `what`."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if isinstance(error, (HfHubHTTPError, HFValidationError, OSError)):
            first = str(error).strip().split("\n")[0]
            raise EditkitError(
                f"{self.what}: {first}. Check the name (USER/NAME), the network, and the token (hf auth login)."
            ) from error


def card(
    title: str,
    rows: Sequence[tuple[str, str]],
    base: Mapping[str, str],
    digest: str,
    how: Mapping[str, Any],
    licence: str,
    record: Mapping[str, Any] | None = None,
) -> str:
    """The card of an edit, in Markdown: what it changes, how it was made and measured, and how it is used.

    - `title`, `rows`: what the edit shows of itself. `base`, `digest`, `how`: its base, identity and provenance.
    - `licence`: of the edit, as the Hub names licences. `record`: of the run that measured it, as record.json has it.
    """
    head = {"base_model": base["name"], "license": licence, "library_name": "editkit", "tags": ["model-editing", TAG]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {title}", ""]
    lines += [f"- {name or '…'}: {value}" for name, value in rows]
    lines += ["", f"Digest `{digest}`. It belongs on the base with digest `{base['digest']}` and on no other.", ""]
    lines += ["    from editkit import Edit, load", f'    lm = load("{base["name"]}")']
    lines += ['    with Edit.from_hub("THIS REPOSITORY", "A COMMIT").applied(lm): ...', "", "## Measured", ""]
    lines += _measured(record) if record else ["Not measured: no record of a run was given."]
    settings = json.dumps(how.get("settings", {}), indent=2, ensure_ascii=False)
    return "\n".join([*lines, "", "## Settings", "", "```json", settings, "```", ""])


def _measured(record: Mapping[str, Any]) -> list[str]:
    """The protocol and the scores of a run."""
    task, data = record.get("task"), (record.get("data") or {}).get("source")
    lines = [
        f"By `task={task}`" + (f" on {data}." if data else "."),
        "",
        "| metric | before | after | n |",
        "|---|---|---|---|",
    ]
    sides: dict[str, dict[str, Any]] = {}
    for score in record.get("scores", []):
        if not score.get("asked"):
            sides.setdefault(score["metric"], {})[score["when"]] = score
    for metric, by in sides.items():
        values = [by.get(when, {}) for when in ("before", "after")]
        shown = [value.get("mean", value.get("value")) for value in values]
        if isinstance(shown[1], int | float):
            cells = [f"{each:.3f}" if isinstance(each, int | float) else "–" for each in shown]
            lines.append(f"| {metric} | {' | '.join(cells)} | {values[1].get('n', 1)} |")
    commit = (record.get("environment") or {}).get("commit")
    return [*lines, "", f"Made by editkit at commit {commit}." if commit else ""]
