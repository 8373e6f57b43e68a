"""The file of an edit: tensors in float32, everything else as JSON, in safetensors (tensorfiles.py)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editkit.edits.base import Base
from editkit.edits.delta import Delta, delta_of
from editkit.errors import ConfigError
from editkit.models import codebook, prefix  # noqa: F401  the kinds of contents that files may hold
from editkit.models.installed import Installed, kind_named
from editkit.tensorfiles import FileKind, explained, read_tensors, require_fields, starting_with, to_bytes

EDIT_FILE = FileKind(
    format="editkit-edit/1",
    noun="an edit",
    fields={"base": (dict,), "deltas": (list,), "parents": (list,), "provenance": (dict,)},
    optional={"installed": (list,)},
    remedy="Compute the edit again, or copy the file again.",
    origin="Edits are written by edit.save(path) and as edit.safetensors in a run folder.",
    renew="Edit.load(path).save(path)",
)


class Parts(NamedTuple):
    """What a file holds: the fields of an Edit, in its order."""

    deltas: tuple[Delta, ...]
    base: Base
    provenance: dict[str, Any]
    parents: tuple[str, ...]
    memory: dict[str, Tensor]
    installed: tuple[Installed, ...]


def written(parts: Parts, *, seal: bool = True) -> bytes:
    """The file's bytes: the same parts always give the same. `seal`: with the file's own digest."""
    tensors, rows = {}, []
    for number, delta in enumerate(parts.deltas):
        tensors[f"{number}.left"] = delta.left.float()
        if delta.right is not None:
            tensors[f"{number}.right"] = delta.right.float()
        rows.append(delta.described())
    tensors |= {f"memory.{name}": tensor.float() for name, tensor in parts.memory.items()}
    header = {
        "base": asdict(parts.base),
        "deltas": rows,
        "parents": list(parts.parents),
        "provenance": parts.provenance,
    }
    if parts.installed:  # files of other edits have the bytes that they had before there were contents
        contents = [each.to_file() for each in parts.installed]
        header["installed"] = [
            {"kind": each.kind, **values} for each, (values, _) in zip(parts.installed, contents, strict=True)
        ]
        tensors |= {
            f"installed.{number}.{name}": tensor
            for number, (_, own) in enumerate(contents)
            for name, tensor in own.items()
        }
    return to_bytes(EDIT_FILE, header, tensors, seal=seal)


def read(path: str | Path, *, note: bool = True) -> Parts:
    """What the file of an edit holds. Raises EditFileError for a missing, damaged or foreign file.

    `note`: warn of a file that was written before files had a digest.
    """
    header, tensors = read_tensors(path, EDIT_FILE, note=note)
    with explained(path, EDIT_FILE):  # what a file without a digest may hold
        require_fields(header["base"], dict.fromkeys(("name", "digest", "dtype"), (str,)), "its base")
        if not all(isinstance(parent, str) for parent in header["parents"]):
            raise ValueError("a parent is not a digest")
        deltas = tuple(delta_of(row, i, tensors) for i, row in enumerate(header["deltas"]))
        memory = starting_with(tensors, "memory.")
        used = len(memory) + sum(1 if delta.right is None else 2 for delta in deltas)
        installed = []
        for number, row in enumerate(header.get("installed", [])):
            own = starting_with(tensors, f"installed.{number}.")
            installed.append(_content_of(row, own))
            used += len(own)
        if used != len(tensors) or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            raise ValueError("its tensors are not the float32 factors of its changes")
        base, parents = Base(**header["base"]), tuple(header["parents"])
        return Parts(deltas, base, header["provenance"], parents, memory, tuple(installed))


def _content_of(row: Any, tensors: dict[str, Tensor]) -> Installed:
    """The content of a file's row. Raises ValueError or KeyError where it is none of a kind that is known here."""
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        raise ValueError("a content has no kind")
    try:
        kind = kind_named(row["kind"])
    except ConfigError as error:
        raise ValueError(f"its contents are not known here: {error}") from error
    return kind.from_file({name: value for name, value in row.items() if name != "kind"}, tensors)
