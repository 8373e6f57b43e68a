"""Arrays with named axes on the disk: the numbers as .npz, all else as JSON beside them."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy
import torch
from torch import Tensor

from editkit.errors import EditkitError
from editkit.files import write_bytes, write_text
from editkit.settings import TraceSettings


def json_of(settings: TraceSettings) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return asdict(settings) | {"kinds": list(settings.kinds)}


def write_arrays(path: Path, arrays: Mapping[str, Tensor], said: Mapping[str, Any]) -> Path:
    """Write `path`.npz and `path`.json; returns the first. A suffix that `path` has already is not doubled."""
    data, text = _both(path)
    packed = io.BytesIO()
    named: dict[str, Any] = {name: array.cpu().numpy() for name, array in arrays.items()}
    numpy.savez_compressed(packed, **named)
    write_text(text, json.dumps(dict(said), indent=1, ensure_ascii=False) + "\n")
    return write_bytes(data, packed.getvalue())


def read_arrays(path: Path, axes: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_arrays` wrote, which must have these axes. Raises EditkitError."""
    data, text = _both(path)
    try:
        said = json.loads(text.read_text(encoding="utf-8"))
        with numpy.load(data, allow_pickle=False) as found:
            arrays = {name: torch.from_numpy(found[name]) for name in found.files}
        named = tuple(said["axes"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise EditkitError(
            f"No arrays can be read from '{data}' and '{text.name}' ({type(error).__name__}: {error}). Give the path "
            "that save() was given, with both files there."
        ) from error
    if named != tuple(axes):
        raise EditkitError(f"'{data}' has axes {', '.join(named)}; {', '.join(axes)} were asked for: another result.")
    return arrays, said


def _both(path: Path) -> tuple[Path, Path]:
    stem = path.name.removesuffix(".npz").removesuffix(".json")
    return path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.json")
