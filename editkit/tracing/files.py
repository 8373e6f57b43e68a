"""Arrays with named axes on the disk: the numbers as .npz, all else as JSON beside them. No torch.

The JSON holds `axes` (the names of a table's axes) and `along` (for each axis, what stands along it).
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy

from editkit.errors import EditkitError
from editkit.files import write_bytes, write_text
from editkit.settings import TraceSettings

# The axes of each trace's tables, and what its JSON holds beside them.
ONE_AXES, AVERAGE_AXES = ("token", "block"), ("fact", "part", "block")
ONE_FIELDS = ("tokens", "subject", "answer", "clean", "corrupted", "window", "others", "how")
AVERAGE_FIELDS = ("window", "skipped", "complete", "how")


# What a trace puts back.
PLACES = {
    "state": "state",
    "mlp": "MLP outputs",
    "attention": "attention outputs",
    "severed_mlp": "state, later MLPs severed",
    "severed_attention": "state, later attention severed",
}


def place_kind(name: str, window: int) -> str:
    """What is put back, with the blocks that are put back together."""
    title = PLACES.get(name, name.replace("_", " "))
    return f"{title}, window of {window}" if name in ("mlp", "attention") and window > 1 else title


def json_of(settings: TraceSettings) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return asdict(settings) | {"kinds": list(settings.kinds)}


def write_arrays(path: Path, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write `path`.npz and `path`.json; returns the first. A suffix that `path` has already is not doubled.

    - `arrays`: tables by name, numpy arrays or tensors on the CPU.
    - `about`: everything else, as JSON, with `axes` and `along`.
    """
    data, text = _both(path)
    packed = io.BytesIO()
    named: dict[str, Any] = {name: numpy.asarray(array) for name, array in arrays.items()}
    numpy.savez_compressed(packed, **named)
    write_text(text, json.dumps(dict(about), indent=1, ensure_ascii=False) + "\n")
    return write_bytes(data, packed.getvalue())


def read_arrays(
    path: Path, axes: Sequence[str], fields: Sequence[str]
) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
    """What `write_arrays` wrote: tables with these axes, or with the first of them alone, and JSON with these fields.

    Every table's shape is compared with what the JSON says stands along its axes. Raises EditkitError.
    """
    data, text = _both(path)
    try:
        about = json.loads(text.read_text(encoding="utf-8"))
        with numpy.load(data, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        named = tuple(about["axes"])
        missing = [name for name in fields if named == tuple(axes) and name not in about]
        if missing:
            raise KeyError(", ".join(missing))
        shape = tuple(len(about["along"][axis]) for axis in named)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise EditkitError(
            f"No arrays can be read from '{data}' and '{text.name}' ({type(error).__name__}: {error}): they are "
            "damaged or not there. Give the path that save() was given, with both files there."
        ) from error
    if named != tuple(axes):
        raise EditkitError(f"'{data}' has axes {', '.join(named)}; {', '.join(axes)} were asked for: another result.")
    wrong = [name for name, array in arrays.items() if array.shape not in (shape, shape[:1])]
    if wrong or not any(array.shape == shape for array in arrays.values()):
        raise EditkitError(
            f"'{data}' and '{text.name}' do not belong together: {', '.join(wrong) or 'no table'} is not "
            f"{' × '.join(map(str, shape))}. Take both files from one save()."
        )
    return arrays, about


def _both(path: Path) -> tuple[Path, Path]:
    stem = path.name.removesuffix(".npz").removesuffix(".json")
    return path.with_name(f"{stem}.npz"), path.with_name(f"{stem}.json")
