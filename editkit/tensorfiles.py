"""The safetensors files that editkit writes and reads again: edits, second moments, hypernetworks.

The metadata of such a file has one entry, `editkit`: a JSON object with the file's `format`, with the values that are
not tensors, and with `sha256`, the digest of all values and tensors. Reading computes the digest anew, so that a
damaged file is one clear EditFileError and never other values. Files written before there was a digest are read with
a warning. A path is opened once per read: another process may replace the file between two openings.

Headers are read without torch, which is imported where tensors are made.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import EditFileError
from editkit.files import whole

if TYPE_CHECKING:
    from torch import Tensor

MAPPED = 64 << 20  # bytes of a tensor from which the file itself is its memory
LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
SEAL = "sha256"  # the key of the digest
# safetensors' names of dtypes, in its order within a file: torch's name, bytes of one number
DTYPES = {
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
CODES = {f"torch.{name}": code for code, (name, _) in DTYPES.items()}


@dataclass(frozen=True)
class FileKind:
    """One kind of file: what its header must have, and the words of its errors.

    - `format`: the value of `format` in the header, as "editkit-edit/1".
    - `noun`: what the file holds, with its article, as "an edit".
    - `fields`: each key of the header, without `format` and the digest, with the JSON types that it may have.
    - `optional`: the same for keys that a header may lack.
    - `remedy`: a sentence, what to do about a damaged file. `origin`: a sentence, where such files come from.
    - `renew`: how a file without a digest is written with one.
    """

    format: str
    noun: str
    fields: Mapping[str, tuple[type, ...]]
    remedy: str
    origin: str
    renew: str
    optional: Mapping[str, tuple[type, ...]] = field(default_factory=dict)

    def fields_of(self, header: Mapping[str, Any]) -> dict[str, tuple[type, ...]]:
        """The keys that `header` must have, with those of the optional ones that it has."""
        return dict(self.fields) | {name: types for name, types in self.optional.items() if name in header}


@dataclass(frozen=True)
class _Place:
    """One tensor of a file: its name, safetensors' name of its dtype, its shape, and its bytes in the data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path | str, kind: FileKind) -> dict[str, Any]:
    """The JSON values of a file of `kind`, without `format` and the digest. Tensors are not read.

    The header must be sound, but the digest is not compared: it covers the tensors. Raises EditFileError for a
    missing, foreign or damaged file.
    """
    with explained(path, kind), Path(path).open("rb") as file:
        header, _ = _read_header(file, path, kind)
    return {key: value for key, value in header.items() if key != SEAL}


def read_tensors(path: Path | str, kind: FileKind, *, note: bool = True) -> tuple[dict[str, Any], dict[str, "Tensor"]]:
    """The JSON values of a file of `kind`, as `read_header` gives them, and its tensors on the CPU, by name.

    Raises EditFileError for a missing, foreign or damaged file. Warns of a file without a digest, if `note`.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    described: dict[str, list[Any]] = {}
    with explained(path, kind), Path(path).open("rb") as file:
        header, places = _read_header(file, path, kind)
        for place in places:  # in the order of the data part, without gaps
            data = _data(file, place.end - place.start)
            described[place.name] = [place.dtype, list(place.shape), hashlib.sha256(data).hexdigest()]
            dtype = getattr(torch, DTYPES[place.dtype][0])
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[place.name] = flat.reshape(place.shape)
        stored = header.pop(SEAL, None)
        if stored is not None and stored != contents_digest({"format": kind.format} | header, described):
            raise ValueError("its contents do not have the digest that was stored with them")
    if stored is None and note:
        warnings.warn(
            f"'{path}' was written without a digest, so damage would not be noticed. To write it anew with one: "
            f"{kind.renew}.",
            stacklevel=3,
        )
    return header, tensors


def write_tensors(path: Path | str, kind: FileKind, header: Mapping[str, Any], tensors: Mapping[str, "Tensor"]) -> Path:
    """Write a file of `kind` with its digest, completely or not at all. Raises OutputError.

    `header`: the JSON values, by key. `tensors`: by name.
    """
    path = Path(path)
    # Not safetensors' save_file: it writes to a file of a random name, which a kill leaves and no run can know, and
    # which its owner alone may read.
    with whole(path) as temporary, temporary.open("wb") as file:
        file.writelines(_pieces(kind, header, tensors, seal=True))
    return path


def to_bytes(kind: FileKind, header: Mapping[str, Any], tensors: Mapping[str, "Tensor"], *, seal: bool = True) -> bytes:
    """The bytes that `write_tensors` writes: the same contents give the same bytes. `seal`: with the digest."""
    return b"".join(_pieces(kind, header, tensors, seal=seal))


def _pieces(
    kind: FileKind, header: Mapping[str, Any], tensors: Mapping[str, "Tensor"], *, seal: bool
) -> Iterator[bytes | memoryview]:
    """The bytes of a file, one after the other: what stands before the data, and each tensor's.

    Order, spaces and escapes are those of safetensors' own writer, so that both write the same bytes.
    """
    plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    codes = {name: CODES[str(tensor.dtype)] for name, tensor in plain.items()}
    order = sorted(plain, key=lambda name: (list(DTYPES).index(codes[name]), name))
    entries: dict[str, Any] = {"__metadata__": _metadata(kind, header, plain, seal=seal)}
    at = 0
    for name in order:
        end = at + plain[name].numel() * plain[name].element_size()
        entries[name] = {"dtype": codes[name], "shape": list(plain[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield _bytes(plain[name])


def contents_digest(values: Mapping[str, Any], tensors: Mapping[str, list[Any]] | None = None) -> str:
    """sha256 of JSON `values`, and of the tensors' [dtype, shape, sha256 of the bytes] by name; in no order."""
    normal = json.loads(json.dumps([values, tensors or {}]))  # keys become text, as the file will have them
    return hashlib.sha256(json.dumps(normal, sort_keys=True).encode()).hexdigest()


def strict_json(text: str | bytes) -> Any:
    """The parsed JSON. Raises ValueError for text that is not JSON or UTF-8, and for a key that comes twice."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def starting_with(tensors: "Mapping[str, Tensor]", start: str) -> "dict[str, Tensor]":
    """The tensors whose names begin with `start`, by the rest of the name."""
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def require_fields(found: object, fields: Mapping[str, tuple[type, ...]], what: str) -> dict[str, Any]:
    """`found`, which must be an object with exactly these keys and the types given for each. Raises ValueError.

    `what` names the object in the error, as "its header".
    """
    if not isinstance(found, dict):
        raise ValueError(f"{what} is {type(found).__name__}, and not an object")
    if found.keys() != fields.keys():
        wrong = sorted(fields.keys() - found.keys()) or sorted(found.keys() - fields.keys())
        raise ValueError(f"{what} {'lacks' if wrong[0] in fields else 'has the unknown key'} {wrong[0][:80]!r}")
    for key, types in fields.items():
        if type(found[key]) not in types:  # not isinstance: True is no count
            raise ValueError(f"{key} of {what} is {type(found[key]).__name__}, and not {types[0].__name__}")
    return found


@contextlib.contextmanager
def explained(path: Path | str, kind: FileKind) -> Iterator[None]:
    """Turn what goes wrong in the body, which reads `path`, into one EditFileError that says what to do."""
    try:
        yield
    except OSError as error:
        raise EditFileError(
            f"'{path}' cannot be read as {kind.noun}: {error.strerror or error}. {kind.remedy}"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError, OverflowError) as error:
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise EditFileError(f"'{path}' cannot be read as {kind.noun}: it is damaged: {said}. {kind.remedy}") from error


def _read_header(file: BufferedReader, path: Path | str, kind: FileKind) -> tuple[dict[str, Any], list[_Place]]:
    """The values with the digest but without `format`, and the places of the tensors in the order of their bytes.

    Afterwards `file` is at the first byte of the data part.
    """
    # 1) the outer header: its length, JSON, places of tensors
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise ValueError("it is not a safetensors file, or is cut short")
    text = bytearray(length)
    _fill(file, text)
    entries = strict_json(bytes(text))
    if not isinstance(entries, dict):
        raise ValueError("its header is not an object")
    metadata = entries.pop("__metadata__", {})
    places = _places(entries, size - 8 - length)
    # 2) the values of editkit, which are JSON in a text of the metadata
    if not isinstance(metadata, dict) or not isinstance(metadata.get("editkit", ""), str):
        raise ValueError("its metadata are not texts")
    header = strict_json(metadata.get("editkit", "{}"))
    found = header.pop("format", None) if isinstance(header, dict) else None
    if found != kind.format:
        raise EditFileError(_foreign(path, kind, found))
    fields = kind.fields_of(header if isinstance(header, dict) else {}) | ({SEAL: (str,)} if SEAL in header else {})
    return require_fields(header, fields, "its header"), places


def _foreign(path: Path | str, kind: FileKind, found: object) -> str:
    start = f"'{path}' does not hold {kind.noun}: its format is {repr(found)[:80]}, and {kind.format!r} is read here. "
    same = isinstance(found, str) and found.split("/")[0] == kind.format.split("/")[0]
    return start + ("Update editkit." if same else kind.origin)


def _places(entries: dict[str, Any], size: int) -> list[_Place]:
    """The tensors that a header lists, in the order of their bytes, which must be all `size` bytes of the data part."""
    places = []
    for name, entry in entries.items():
        what = f"the entry of tensor {name[:80]!r}"
        require_fields(entry, {"dtype": (str,), "shape": (list,), "data_offsets": (list,)}, what)
        numbers = [*entry["shape"], *entry["data_offsets"]]
        if any(type(n) is not int or n < 0 for n in numbers) or len(entry["data_offsets"]) != 2:
            raise ValueError(f"{what} has a shape or offsets that are no numbers from 0 on")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{what} has the dtype {entry['dtype'][:80]!r}")
        place = _Place(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        if place.end - place.start != math.prod(place.shape) * DTYPES[place.dtype][1]:
            raise ValueError(f"{what} has a shape that does not fit its offsets")
        places.append(place)
    places.sort(key=lambda place: (place.start, place.end))
    at = 0
    for place in places:
        if place.start != at:
            raise ValueError(f"tensor {place.name[:80]!r} begins at byte {place.start} of its data, and not at {at}")
        at = place.end
    if at != size:
        raise ValueError(f"its tensors have {at} bytes, and {size} are there")
    return places


def _metadata(
    kind: FileKind, header: Mapping[str, Any], tensors: Mapping[str, "Tensor"], *, seal: bool
) -> dict[str, str]:
    """The metadata of a file. One key only: safetensors does not keep the order of several."""
    require_fields(json.loads(json.dumps(header)), kind.fields_of(header), "the header to write")
    values = {"format": kind.format, **header}
    if seal:
        values[SEAL] = contents_digest(values, {name: described(tensor) for name, tensor in tensors.items()})
    return {"editkit": json.dumps(values, sort_keys=True)}


def described(tensor: "Tensor") -> list[Any]:
    """[dtype, shape, sha256 of the bytes], without a copy of a contiguous tensor."""
    return [CODES[str(tensor.dtype)], list(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest()]


def _bytes(tensor: "Tensor") -> memoryview | bytes:
    """The bytes of a tensor on the CPU; where they are, if it is contiguous."""
    import torch

    return tensor.detach().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""


def _data(file: BufferedReader, size: int) -> bytearray | memoryview:
    """The next `size` bytes. Many of them are a view of the file, which takes no memory of its own; what is written to
    it stays with this process. Files are replaced as a whole (files.py), so the view keeps what it shows."""
    if size < MAPPED:
        data = bytearray(size)
        _fill(file, data)
        return data
    begin = file.tell()
    view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[begin : begin + size]
    if len(view) < size:
        raise ValueError(f"it ends {size - len(view)} bytes early")
    file.seek(size, 1)
    return view


def _fill(file: BufferedReader, buffer: bytearray) -> None:
    """Fill `buffer` with the next bytes of `file`. Raises ValueError when there are fewer."""
    view, done = memoryview(buffer), 0
    while done < len(buffer):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError("it is cut short")
        done += count


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} comes twice in its JSON")
    return found
