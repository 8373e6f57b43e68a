"""What damaged files do: random damages of an edit, a session, a second moment and a hypernetwork, each read again.

    python scripts/damage.py                           # 1,000 of each kind; some minutes on one core
    python scripts/damage.py --kind edit --n 100 --seed 1
    python scripts/damage.py --old                     # files without a digest, as older editkits wrote them

Each trial copies sound files of the atlas model, does one damage to one of them, and reads them. It ends as one of:

- clear error: an EditkitError
- equal contents: read, with the values that were stored
- traceback: any other exception
- other values: read, with values that are not those that were stored

The script ends with 1 where a file with a digest gave a traceback or other values.
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from editkit.edits import Edit
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.mend import Mend
from editkit.methods.r_rome import RRomeSettings
from editkit.models.load import LanguageModel, load
from editkit.models.snapshot import digest
from editkit.moments import SecondMoment
from editkit.session import Session
from editkit.settings import ContextSettings, MomentSettings
from editkit.tensorfiles import SEAL

OUTCOMES = ("clear error", "equal contents", "traceback", "other values")
FACTS = [
    Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    Fact("The capital of {} is", "France", "Madrid", "Paris"),
]
SETTINGS = RRomeSettings(steps=2, contexts=ContextSettings(lengths=(4,), counts=(1,)))
NO_MOMENTS = MomentSettings(enabled=False)


@dataclass(frozen=True)
class Subject:
    """One kind of file: its sound bytes by file name, and `read`, which gives the contents of a folder with them."""

    files: dict[str, bytes]
    read: Callable[[Path], Any]


def subjects(lm: LanguageModel, folder: Path, kinds: list[str]) -> dict[str, Subject]:
    """Sound files of each of `kinds`, made with `lm` by way of `folder`."""
    found = {}
    with Session(lm, "r_rome", SETTINGS, moments=NO_MOMENTS, progress=False) as session:
        edit = session.edit(FACTS[0])
        session.edit(FACTS[1])
        session.save(folder / "session")

    if "edit" in kinds:
        edit.save(folder / "edit" / "edit.safetensors")

        def read_edit(place: Path) -> Any:
            loaded = Edit.load(place / "edit.safetensors")
            with loaded.applied(lm):
                return loaded.to_bytes()

        found["edit"] = Subject(bytes_of(folder / "edit"), read_edit)
    if "session" in kinds:

        def read_session(place: Path) -> Any:
            with Session.load(place, lm, moments=NO_MOMENTS, progress=False) as loaded:
                how = (loaded.method, loaded.settings, loaded.transform, loaded.seed)
                return how, [step.to_bytes() for step in loaded.steps]

        found["session"] = Subject(bytes_of(folder / "session"), read_session)
    if "moment" in kinds:
        keys = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).double()
        about = {"model": lm.name, "model_digest": lm.digest, "settings": {"source": "text"}, "seed": 0}
        moment = SecondMoment("transformer.h.3.mlp.c_proj", keys.T @ keys / 200, 200, "text", 150.0, about)
        moment.save(folder / "moment" / "moment.safetensors")

        def read_moment(place: Path) -> Any:
            found = SecondMoment.load(place / "moment.safetensors")
            return found.module, found.source, found.effective_count, found.provenance, found.digest

        found["moment"] = Subject(bytes_of(folder / "moment"), read_moment)
    if "hypernetwork" in kinds:
        Mend.for_model(lm, (1, 2), rank=2, seed=3).save(folder / "hypernetwork" / "mend.safetensors")

        def read_network(place: Path) -> Any:
            network = Mend.load(place / "mend.safetensors")
            network.check_base(lm)
            tensors = {name: digest(tensor) for name, tensor in network.state_dict().items()}
            return network.sites, network.d_ff, network.d_model, network.rank, network.base, tensors

        found["hypernetwork"] = Subject(bytes_of(folder / "hypernetwork"), read_network)
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- damages: each takes the bytes of a file and gives others -----------------------------------------------------


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    """1 to 16 bytes more."""
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.randint(1, 16)) + data[place:]


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """One character of the header is another printable one; of a file that is all JSON, one of its characters."""
    start, end = (0, len(data)) if is_json(data) else (8, 8 + int.from_bytes(data[:8], "little"))
    place = rng.randrange(start, end)
    return data[:place] + bytes([rng.randrange(32, 127)]) + data[place + 1 :]


def change_json(data: bytes, rng: random.Random) -> bytes:
    """One value of the JSON is another, or is missing, or another comes with it; the file is well-formed."""
    if is_json(data):
        return json.dumps(changed(json.loads(data), rng)).encode()
    header, rest = parts(data)
    if rng.random() < 0.3:
        return joined(changed(header, rng), rest)
    values = changed(json.loads(header["__metadata__"]["editkit"]), rng)
    header["__metadata__"]["editkit"] = json.dumps(values)
    return joined(header, rest)


def rename(data: bytes, rng: random.Random) -> bytes:
    """A tensor has another name, or two have exchanged theirs; of a file that is all JSON, a key has."""
    header, rest = (json.loads(data), b"") if is_json(data) else parts(data)
    names = sorted(header.keys() - {"__metadata__"})
    one = rng.choice(names)
    other = rng.choice([name for name in (*names, one + "x", one[:-1], "0.right") if name != one])
    header[one], header[other] = header.get(other), header[one]
    if header[one] is None:
        del header[one]
    return json.dumps(header).encode() if is_json(data) else joined(header, rest)


DAMAGES = {
    "bit flipped": flip,
    "cut": cut,
    "bytes inserted": insert,
    "header edited": edit_header,
    "JSON changed": change_json,
    "renamed": rename,
}
SWAPPED = "files swapped"  # of a session: one step's file has the bytes of another's


def changed(values: Any, rng: random.Random) -> Any:
    """A copy of JSON `values` in which one place, drawn from all of them, is different."""
    values = json.loads(json.dumps(values))
    holder, key = rng.choice(list(places(values)))
    if rng.random() < 0.2:
        del holder[key]
    elif rng.random() < 0.1 and isinstance(holder, dict):
        holder[key + "x"] = holder[key]
    else:
        holder[key] = rng.choice(others(holder[key], rng))
    return values


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key or index) of every value in nested JSON."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield values, key
        yield from places(value)


def others(value: Any, rng: random.Random) -> list[Any]:
    """Values that are not `value`, of its own type and of others."""
    near: list[Any] = [None, [], {}, "x", -1, 0.5, not value]
    if isinstance(value, str):
        near += [value + "x", value[:-1], value.upper(), "transformer.h.7.mlp.c_proj", "\ud800", "a\0b", "../" + value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        near += [value + 1, -value - 1, value * 2 + 1, 10**30]
    return [each for each in near if each != value or type(each) is not type(value)]


def is_json(data: bytes) -> bool:
    return data[:1] == b"{"


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def without_digest(data: bytes) -> bytes:
    """The file as it was written before there was a digest."""
    if is_json(data):
        return json.dumps({key: value for key, value in json.loads(data).items() if key != SEAL}).encode()
    header, rest = parts(data)
    values = json.loads(header["__metadata__"]["editkit"])
    del values[SEAL]
    header["__metadata__"]["editkit"] = json.dumps(values, sort_keys=True)
    return joined(header, rest)


# --- trials ---------------------------------------------------------------------------------------------------------


def damaged(files: dict[str, bytes], damage: str, rng: random.Random) -> dict[str, bytes]:
    """The files with one damage; never the same bytes."""
    if damage == SWAPPED:
        one, other = rng.sample([name for name in files if name.endswith(".safetensors")], 2)
        return files | {one: files[other]} | ({other: files[one]} if rng.random() < 0.5 else {})
    name = rng.choice(sorted(files))
    while (found := DAMAGES[damage](files[name], rng)) == files[name]:
        pass
    return files | {name: found}


def trial(subject: Subject, files: dict[str, bytes], expected: Any) -> tuple[str, str]:
    """How reading `files` ends, one of OUTCOMES, and the message of the error."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        try:
            found = subject.read(Path(folder))
        except EditkitError as error:
            return "clear error", str(error)
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"
    return ("equal contents" if found == expected else "other values"), ""


def trials(subject: Subject, n: int, seed: int, *, old: bool = False) -> Iterator[tuple[str, str, str]]:
    """(damage, outcome, message) of `n` trials. `old`: of files without a digest."""
    files = {name: without_digest(data) for name, data in subject.files.items()} if old else subject.files
    rng = random.Random(seed)
    names = [*DAMAGES, *([SWAPPED] if len(files) > 2 else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            expected = subject.read(Path(folder))
        for number in range(n):
            damage = names[number % len(names)]
            yield damage, *trial(subject, damaged(files, damage, rng), expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["edit", "session", "moment", "hypernetwork"]
    parser.add_argument("--n", type=int, default=1000, help="damages of each kind of file; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the damages; default: 0")
    parser.add_argument("--kind", choices=kinds, action="append", help="may come several times; default: all")
    parser.add_argument("--old", action="store_true", help="files without a digest")
    options = parser.parse_args()
    if options.n < 1:
        parser.error("--n takes 1 or more")
    torch.set_num_threads(1)
    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, subject in subjects(load("atlas", device="cpu"), Path(folder), options.kind or kinds).items():
            each = trials(subject, options.n, options.seed, old=options.old)
            for damage, outcome, message in tqdm(each, total=options.n, desc=kind, leave=False, disable=None):
                counts[kind, damage][outcome] += 1
                if outcome in OUTCOMES[2:]:
                    bad.append(f"{kind}, {damage}: {outcome} {message}")
    print(f"{'':32}" + "".join(f"{outcome:>16}" for outcome in OUTCOMES))
    for kind in options.kind or kinds:
        rows = {damage: count for (which, damage), count in counts.items() if which == kind}
        for damage, count in [*rows.items(), ("all", sum(rows.values(), collections.Counter()))]:
            print(f"{kind:14}{damage:18}" + "".join(f"{count[outcome]:16}" for outcome in OUTCOMES))
    for line in list(dict.fromkeys(bad))[:20]:
        print(line)
    return int(bool(bad) and not options.old)


if __name__ == "__main__":
    sys.exit(main())
