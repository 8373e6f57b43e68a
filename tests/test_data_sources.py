"""load_cases: kinds of file and folder, limits and shards, cases without conflict, and what is wrong with a source."""

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from editkit.data import Cases, load_cases
from editkit.errors import ConfigError, DataError
from editkit.settings import DataSettings
from tests.records import COUNTERFACT, COUNTERFACT_FLAT, KNOWEDIT, MQUAKE, RECORDS, TEXTS

CITIES = ["Oslo", "Rome", "Bern", "Lima", "Cairo", "Paris", "Quito", "Tokyo", "Delhi", "Accra"]


def flat(number: int, **changes: Any) -> dict[str, Any]:
    subject = f"Tower {number}"
    return COUNTERFACT_FLAT | {
        "case_id": 100 + number,
        "subject": subject,
        "prompt": f"{subject} stands in",
        "ground_truth": CITIES[number % 10],
        "target_new": CITIES[(number + 1) % 10],
        **changes,
    }


FLAT = [flat(number) for number in range(10)]


def written(folder: Path, records: Any, name: str = "records.json") -> str:
    path = folder / name
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def loaded(path: str | Path, name: str = "counterfact_flat", distinct: bool = False, **settings: Any) -> Cases:
    return load_cases(DataSettings(name, str(path), **settings), distinct=distinct)


# --- files and folders --------------------------------------------------------------------------------------------


def test_every_kind_of_file_holds_the_same_cases(tmp_path: Path) -> None:
    paths = [written(tmp_path, FLAT), written(tmp_path, FLAT, "records.jsonl")]
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": FLAT}), encoding="utf-8")
    (tmp_path / "single.json").write_text(json.dumps({"facts": FLAT}), encoding="utf-8")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, FLAT)), encoding="utf-8")
    (tmp_path / "bom.json").write_text(json.dumps(FLAT), encoding="utf-8-sig")
    with (tmp_path / "records.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, FLAT[0])
        table.writeheader()
        table.writerows(FLAT)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FLAT), tmp_path / "records.parquet")
    datasets.Dataset.from_list(FLAT).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(FLAT)}).save_to_disk(tmp_path / "split")
    paths += [str(tmp_path / name) for name in ("object.json", "single.json", "lines.json", "bom.json", "records.csv")]
    paths += [str(tmp_path / name) for name in ("records.parquet", "saved", "split")]
    first = loaded(paths[0])
    assert (first.found, first.indices, first.rejected) == (10, tuple(range(10)), ())
    assert [case.id for case in first.cases] == [str(100 + number) for number in range(10)]
    assert (
        first.source == paths[0]
        and first.digest
        == hashlib.sha256(hashlib.sha256((tmp_path / "records.json").read_bytes()).digest()).hexdigest()
    )
    for path in paths[1:]:
        found = loaded(path)
        assert (found.cases, found.found, found.rejected) == (first.cases, 10, ()), path


@pytest.mark.parametrize("name", [name for name in RECORDS if name not in TEXTS])
def test_tables_fill_gaps_with_null_and_null_is_absent(name: str, tmp_path: Path) -> None:
    """Records with different fields, through Parquet, are the cases that they are in JSON."""
    records = [{key: value for key, value in RECORDS[name].items() if key != "orig"}]  # Parquet has no empty object
    if name == "knowedit":  # of one type of answer, each record with other fields
        asked = [{"prompt": "Marie Curie died in", "ground_truth": [["France"]]}]
        plain = {key: KNOWEDIT[key] for key in ("subject", "prompt", "target_new", "rephrase_prompt")}
        plain |= {"locality": {"Forgetfulness": asked}, "portability": {"Reasoning": asked, "Subject_Aliasing": asked}}
        less = plain | {"locality": {"Relation_Specificity": asked}, "portability": {"Reasoning": asked}}
        records = [plain, {key: value for key, value in less.items() if key != "rephrase_prompt"}]
    if name == "known":
        records.append(RECORDS[name] | {"known_id": 9, "attribute": "Peru"})
    lines = loaded(written(tmp_path, records), name)
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "records.parquet")
    table = loaded(tmp_path / "records.parquet", name)
    assert table.cases == lines.cases and not lines.rejected and len(lines.cases) == len(records)


def test_a_folder_of_files(tmp_path: Path) -> None:
    written(tmp_path, FLAT[:2], "b.json")
    written(tmp_path, [*FLAT[:1], {}, *FLAT[5:]], "a.jsonl")
    (tmp_path / "README.md").write_text("not data", encoding="utf-8")
    found = loaded(tmp_path)
    assert found.found == 9 and found.indices == (0, 2, 3, 4, 5, 6, 7, 8)
    assert [case.id for case in found.cases[:2] + found.cases[-2:]] == ["a/100", "a/105", "b/100", "b/101"]
    (bad,) = found.rejected
    assert (bad.file, bad.index) == (str(tmp_path / "a.jsonl"), 1)
    assert str(bad) == "a.jsonl record 1, prompt: is missing."


def test_a_hub_data_set_is_pinned(tmp_path: Path) -> None:
    for revision in (None, "", "main"):
        with pytest.raises(ConfigError, match=r"data\.revision is .* for 'hub:some/set:x'\. Pin a commit or a tag"):
            loaded("hub:some/set:x", revision=revision)


def test_a_hub_name_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the Hub: `datasets` takes either by the same call."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    written(tmp_path / "set", FLAT, "test.jsonl")
    found = loaded(f"hub:{tmp_path / 'set'}::test", revision="1f2e3d")
    assert found.cases == loaded(tmp_path / "set").cases and found.source == f"hub:{tmp_path / 'set'}::test@1f2e3d"
    with pytest.raises(DataError, match="'no-such-folder/x' at revision 'abc' could not be opened through `datasets`"):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        loaded("hub:no-such-folder/x", revision="abc")


@pytest.mark.hub
def test_counterfact_from_the_hub() -> None:
    import huggingface_hub

    name = "azhx/counterfact"
    try:
        revision = huggingface_hub.HfApi().dataset_info(name, timeout=5).sha
    except Exception as error:
        pytest.skip(f"the Hub is out of reach: {type(error).__name__}")
    found = loaded(f"hub:{name}::test", "counterfact", revision=revision, limit=5)
    assert len(found.cases) == 5 and found.found > 1000 and len(found.rejected) < found.found / 100


# --- limits, shards, conflicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [None, 8])
def test_shards_are_the_whole_in_its_order(tmp_path: Path, count: int, limit: int | None) -> None:
    path = written(tmp_path, [*FLAT[:4], {}, *FLAT[4:]])
    whole = loaded(path, limit=limit)
    assert whole.indices == (0, 1, 2, 3, 5, 6, 7, 8, 9, 10)[:limit]
    shards = [loaded(path, limit=limit, shard=f"{i}/{count}") for i in range(count)]
    places = [place for shard in shards for place in shard.indices]
    assert len(set(places)) == len(places) and sorted(places) == list(whole.indices)
    merged = sorted(
        zip(places, (case for shard in shards for case in shard.cases), strict=True), key=lambda pair: pair[0]
    )
    assert tuple(case for _, case in merged) == whole.cases
    for shard in shards:
        assert list(shard.indices) == sorted(shard.indices)
        assert (shard.found, shard.rejected, shard.digest) == (11, whole.rejected, whole.digest)


def test_an_empty_shard_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Shard 3/4 of the 2 cases .* is empty"):
        loaded(written(tmp_path, FLAT), limit=2, shard="3/4")


def test_distinct_cases_write_no_prompt_twice(tmp_path: Path) -> None:
    again = flat(2, case_id=7, target_new="Accra")
    path = written(tmp_path, [*FLAT[:3], again, *FLAT[3:]])
    assert len(loaded(path).cases) == 11
    found = loaded(path, distinct=True, limit=5)
    assert found.indices == (0, 1, 2, 4, 5) and found.found == 11
    assert found.notes[-1] == "1 of 11 cases ask a prompt of an earlier case and are left out"
    hops = MQUAKE["requested_rewrite"]
    other = hops[0] | {"subject": "Emma"}
    chained = [MQUAKE, MQUAKE | {"case_id": 13, "requested_rewrite": [other]}]
    chained += [MQUAKE | {"case_id": 14, "requested_rewrite": [hops[0] | {"subject": "Ulysses"}, other]}]
    found = loaded(written(tmp_path, chained), "mquake", distinct=True)
    assert [case.id for case in found.cases] == ["12", "13"]


def test_notes_are_said_once(tmp_path: Path) -> None:
    assert len(loaded(written(tmp_path, FLAT)).notes) == 1
    same = KNOWEDIT | {"target_new": "Warszawa"}
    (note,) = loaded(written(tmp_path, [KNOWEDIT, same, KNOWEDIT]), "knowedit").notes
    assert note.startswith("1 of 3 cases (1): target_new is what the source itself gives as true")


# --- what is wrong with a source ----------------------------------------------------------------------------------


def test_duplicate_ids_are_named(tmp_path: Path) -> None:
    found = loaded(written(tmp_path, [*FLAT[:3], flat(7, case_id=101)]))
    assert [case.id for case in found.cases] == ["100", "101", "102"]
    assert [str(each) for each in found.rejected] == [
        "records.json record 3, (id): '101' is the id of record 1 of the source already."
    ]


def test_bad_records_are_skipped_or_fatal(tmp_path: Path) -> None:
    path = written(tmp_path, [FLAT[0], FLAT[1] | {"subject": ""}, FLAT[2] | {"prompt": "Nobody is in"}])
    found = loaded(path)
    assert (found.found, len(found.cases), len(found.rejected)) == (3, 1, 2)
    with pytest.raises(
        DataError, match=r"^records\.json record 1, subject: is empty\. \(and 1 more\) Correct it"
    ) as caught:
        loaded(path, on_bad_record="fail")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("read_as", "is_"),
    [
        ("zsre", "counterfact"),
        ("mquake", "counterfact"),
        ("counterfact", "mquake"),
        ("counterfact", "counterfact_flat"),
        ("known", "counterfact_flat"),
        ("knowedit", "zsre"),
        ("counterfact_flat", "known"),
        ("counterfact", "knowedit"),
    ],
)
@pytest.mark.parametrize("bad", ["skip", "fail"])
def test_a_wrong_format_is_told_from_the_right_one(tmp_path: Path, read_as: str, is_: str, bad: str) -> None:
    with pytest.raises(
        DataError, match=rf"None of the 2 records .* as {read_as}: .* look like {is_}: try data={is_}\."
    ):
        loaded(written(tmp_path, [RECORDS[is_], RECORDS[is_]]), read_as, on_bad_record=bad)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.json", b"", "is empty"),
        ("empty.jsonl", b"\n \n", "holds no record"),
        ("none.json", b"[]", "holds no record"),
        ("broken.json", b'[{"prompt": ', "is not JSON: .*line 1 column"),
        ("prose.json", b"Once upon a time", "is not JSON"),
        ("deep.json", b"[" * 100_000, "is not JSON"),
        ("latin.json", b'["caf\xe9"]', "is not UTF-8 text"),
        ("one.json", json.dumps(COUNTERFACT_FLAT).encode(), "no list of records but one dict with 'case_id'"),
        ("number.json", b"3", "no list of records but one int"),
        ("lines.jsonl", b"{}\n{", "None of the 2 records .* prompt: is missing. Correct the records"),
        ("table.parquet", b"PAR1 nothing", "is not Parquet"),
        ("table.csv", b'a,b\n"1', "is not CSV"),
        ("table.csv", b"a,b\n1,2\n", "None of the 1 records"),
        ("facts.txt", b"x", r"is of no known kind: its name ends in '\.txt'\. Known are \.json"),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, name: str, content: Any, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        loaded(tmp_path / name)
    assert len(str(caught.value)) < 1000


def test_a_line_that_is_not_json_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(FLAT[0] | {"rephrase_prompt": "A\u2028b"}, ensure_ascii=False), "{broken", json.dumps(FLAT[1])]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    found = loaded(path)
    assert found.indices == (0, 2) and str(found.rejected[0]).startswith(
        "records.jsonl record 1, (line): the line is not"
    )


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    path = written(tmp_path, FLAT, "counterfact.json")
    with pytest.raises(ConfigError, match=rf"No data at .*did you mean '{path}'\? Set data\.path"):
        loaded(tmp_path / "counterfat.json")
    with pytest.raises(ConfigError, match="there is no folder '/no/such' either"):
        loaded("/no/such/file.json")
    with pytest.raises(ConfigError, match=r"data=zsre needs data\.path"):
        load_cases(DataSettings("zsre"))
    with pytest.raises(ConfigError, match=r"data=atlas is bundled and takes no data\.path"):
        loaded(path, "atlas")
    with pytest.raises(ConfigError, match=r"No data 'zsr': did you mean 'zsre'\?"):
        load_cases(DataSettings("zsr"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"has no data file \(\.json.*It is empty"):
        loaded(tmp_path / "folder")
    (tmp_path / "folder" / "deeper").mkdir()
    with pytest.raises(DataError, match="It holds deeper/"):
        loaded(tmp_path / "folder")
    rows = datasets.Dataset.from_list(FLAT)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ConfigError, match=r"has the splits train, test\. Set data\.path to .*splits/train'"):
        loaded(tmp_path / "splits")


def test_the_registry_needs_no_torch() -> None:
    code = "import sys\nimport editkit.data\nfrom editkit.data.formats import names\n"
    code += "assert 'zsre' in names() and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_are_not_changed(tmp_path: Path) -> None:
    record = json.loads(json.dumps(COUNTERFACT))
    path = written(tmp_path, [record])
    assert loaded(path, "counterfact") == loaded(path, "counterfact")
