"""200 malformed records of each format: each is named by file, place and field or is a sound case; none is lost."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from editkit.data import Cases, Texts, load_cases, load_texts
from editkit.errors import DataError
from editkit.settings import DataSettings
from tests.records import ANOTHER_KNOWN, RECORDS, REQUIRED, TEXTS, TIED

Place = tuple[str | int, ...]  # keys and indices from a record's top
DEEP = json.loads("[" * 300 + "]" * 300)
# What makes a required text unusable; MISSING deletes it.
MISSING = object()
BAD = [
    MISSING,
    None,
    7,
    1.5,
    True,
    {},
    DEEP,
    [[["x"]]],
    "",
    " \t\n",
    "\u200b\u2060",
    "\ud800",
    "a \udfff b",
    "\0",
    "x\x07",
]
BAD += ["long " * 20_000, "\u0301", "{} of {}", {"str": 3}]
# What languages do, and is no fault.
ODD = [
    "naïve façade",
    "שלום עולם",
    "\u202emirrored\u202c",
    "e\u0301tat",
    "na\u200dme\ufeff",
    "日本語",
    "🗻",
    "a\nb",
    "1998",
]


def put(record: Any, path: Place, value: Any) -> Any:
    """The record with `value` at `path`; a deep copy."""
    record = copy.deepcopy(record)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    if value is MISSING and isinstance(path[-1], str):
        del parent[path[-1]]
    else:
        parent[path[-1]] = None if value is MISSING else value
    return record


def dotted(path: Place) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def malformed(name: str, count: int = 200) -> list[tuple[Any, Place | None]]:
    """(record, path of the fault): () where it is the whole record, None where there is none."""
    rng = random.Random(name)
    good = RECORDS[name]
    wholes = [[], 3, "text", None, {}, [good], DEEP]
    made: list[tuple[Any, Place | None]] = [(whole, ()) for whole in wholes]
    while len(made) < count:
        path = rng.choice(REQUIRED[name])
        tied = path in TIED.get(name, ())
        if rng.random() < 0.25:
            text = "Who was never named here?" if tied else rng.choice(ODD)
            made.append((put(good, path, text), path if tied else None))
        else:
            value = rng.choice(BAD)
            made.append((put(good, path, value), path))
    for place, (record, _) in enumerate(made):
        for own in ("case_id", "known_id", "id"):
            if isinstance(record, dict) and own in record:
                record[own] = place
    return made


def loaded(name: str, file: Path) -> Cases | Texts:
    """What a format reads: cases, or running text."""
    if name not in TEXTS:
        return load_cases(DataSettings(name, str(file)))
    texts = load_texts(f"{name}:{file}")
    assert texts is not None
    return texts


@pytest.mark.parametrize("name", RECORDS)
def test_malformed_records_are_named(name: str, tmp_path: Path) -> None:
    made = malformed(name)
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(json.dumps(record) for record, _ in made), encoding="utf-8")
    found = loaded(name, file)
    assert len(made) == 200 == found.found == len(found.indices) + len(found.rejected)
    rejected = {each.index: each for each in found.rejected}
    assert not set(rejected) & set(found.indices)
    for place, (_, path) in enumerate(made):
        assert (place in rejected) == (path is not None), (place, path, rejected.get(place))
        if path is not None:
            assert rejected[place].file == str(file)
            # Fields are named as far down as they go; {} in a subject is told where it meets the prompt.
            field, where = rejected[place].field, dotted(path)
            assert where.startswith(field) or field.startswith(where) or "subject" in where, (where, field)
            assert len(str(rejected[place]).encode()) < 300 and "\n" not in str(rejected[place])
    if isinstance(found, Texts):
        assert all(map(str.strip, found.texts)) and f"(and {len(found.rejected) - 1} more)" in found.note
        return
    for case in found.cases:
        assert all(probe.prompt.strip() and probe.wanted for probe in case.probes)
    with pytest.raises(DataError, match=r"records\.jsonl record 0, .*\(and \d+ more\) Correct it, or leave out"):
        load_cases(DataSettings(name, str(file), on_bad_record="fail"))


@pytest.mark.parametrize("name", [name for name in RECORDS if name not in TEXTS])
def test_good_records_are_cases(name: str, tmp_path: Path) -> None:
    """The records that the malformed ones are made of have no fault."""
    file = tmp_path / "records.json"
    file.write_text(
        json.dumps([RECORDS[name], ANOTHER_KNOWN] if name == "known" else [RECORDS[name]]), encoding="utf-8"
    )
    cases = load_cases(DataSettings(name, str(file), on_bad_record="fail"))
    assert cases.found == len(cases.cases) and not cases.rejected
