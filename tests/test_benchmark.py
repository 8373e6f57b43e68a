"""task=benchmark and task=batch: tables that no kill, resume or shard changes; bad cases."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest

from editkit.runs.names import FORMAT
from tests.run_folders import score_of

FAST = ["method.steps=3", "method.contexts.counts=[1,1]", "moments.tokens=2000", "task.measure.fluency=8"]
TABLES = ("summary.csv", "cases.parquet")  # edits.parquet holds seconds
# Bytes are compared, and sums of floats depend on the number of threads; joblib gives its workers fewer.
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "editkit.run", "task=benchmark", *FAST, *arguments]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)


def finished(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run over four cases."""
    folder = tmp_path_factory.mktemp("benchmark")
    done = finished("data.limit=4", "hydra.run.dir=whole", cwd=folder)
    return folder / "whole", done.stdout


def test_the_run_folder_and_the_output(whole: tuple[Path, str]) -> None:
    folder, out = whole
    named = {"record.json", "config.yaml", "cases.jsonl", "cases.parquet", "edits.parquet", "summary.csv"}
    assert named <= {path.name for path in folder.iterdir()}
    assert out.splitlines()[-1] == "whole" and "counterfact.ES" in out and "all equal, bit" in out
    record = json.loads((folder / "record.json").read_text())
    assert record["reversal"]["exact"] and record["edit"]["count"] == 4 and record["data"]["failed"] == []
    assert record["format"] == FORMAT and score_of(record, "counterfact.ES")["n"] == 4
    es = next(declared for declared in record["metrics"] if declared["name"] == "counterfact.ES")
    assert es["better"] == 1 and es["unit"] == "share" and "likelier" in es["meaning"]


def test_the_averages_are_those_of_the_case_table(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    cases = pandas.read_parquet(folder / "cases.parquet")
    summary = pandas.read_csv(folder / "summary.csv").set_index(["metric", "when"])
    for name, kind, better, worse in (("ES", "rewrite", "new", "true"), ("NS", "neighborhood", "true", "new")):
        for when in ("before", "after"):
            rows = cases[cases.kind == kind]
            wins = pandas.Series(rows[f"nll_{better}_{when}"] < rows[f"nll_{worse}_{when}"])
            shares = [group.mean() for _, group in wins.groupby(rows["case"])]
            mean = sum(shares) / len(shares)
            assert summary.loc[(f"counterfact.{name}", when), "mean"] == pytest.approx(mean)


def test_killed_and_resumed_it_ends_with_the_same_bytes(whole: tuple[Path, str], tmp_path: Path) -> None:
    arguments = ["data.limit=4", "hydra.run.dir=killed"]
    process = subprocess.Popen(
        command(*arguments), cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    journal = tmp_path / "killed" / "cases.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "record.json").exists()
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 1 and "resume=true" in again.stderr
    done = finished(*arguments, "resume=true", cwd=tmp_path)
    assert "results of a former run are kept" in done.stdout
    assert tables(tmp_path / "killed") == tables(whole[0])


def test_a_resume_with_other_settings_names_them_and_loses_nothing(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    before = (folder / "cases.jsonl").read_bytes()
    done = run("data.limit=4", "hydra.run.dir=whole", "resume=true", "method.clamp=2", cwd=folder.parent)
    assert done.returncode == 2 and "config.method.clamp=None, and now it is 2.0" in done.stderr
    assert (folder / "cases.jsonl").read_bytes() == before


def test_a_journal_of_another_format_is_refused(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    header, *lines = (whole[0] / "cases.jsonl").read_text().splitlines()
    begun = {name: value for name, value in json.loads(header).items() if name != "format"}
    (folder / "cases.jsonl").write_text("\n".join([json.dumps(begun), *lines]) + "\n")
    done = run("data.limit=4", "hydra.run.dir=old", "resume=true", cwd=tmp_path)
    assert done.returncode == 1 and "was begun in format 1" in done.stderr and len(done.stderr.splitlines()) == 1


def test_shards_merge_to_the_table_of_one_run(whole: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = finished("-m", "data.limit=4", "data.shard=0/2,1/2", "hydra.sweep.dir=sweep", *launcher, cwd=tmp_path)
    assert tables(tmp_path / "sweep" / "merged-0") == tables(whole[0])
    table = pandas.read_csv(tmp_path / "sweep" / "table.csv")
    assert len(table) == 1 and table.run[0] == "merged-0", done.stdout


@pytest.mark.slow
def test_a_batch_that_was_killed_goes_on_with_its_edit(tmp_path: Path) -> None:
    arguments = ["task=batch", "data.limit=6", "method=memit", *FAST[1:3], "method.steps=3"]
    arguments = [a for a in arguments if "counts" not in a] + ["method.contexts.counts=[1]"]
    base = [sys.executable, "-m", "editkit.run"]
    one = subprocess.run([*base, *arguments, "hydra.run.dir=one"], cwd=tmp_path, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    assert json.loads((tmp_path / "one" / "record.json").read_text())["edit"]["count"] == 1
    # As a kill after the second case leaves it.
    two = tmp_path / "two"
    (two / "edits").mkdir(parents=True)
    lines = (tmp_path / "one" / "cases.jsonl").read_bytes().splitlines(keepends=True)
    (two / "cases.jsonl").write_bytes(b"".join(lines[:3]))
    edit = (tmp_path / "one" / "edits" / "0.safetensors").read_bytes()
    (two / "edits" / "0.safetensors").write_bytes(edit)
    done = subprocess.run(
        [*base, *arguments, "hydra.run.dir=two", "resume=true"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert tables(two) == tables(tmp_path / "one")
    assert (two / "edits" / "0.safetensors").read_bytes() == edit


def test_a_case_that_cannot_be_edited_is_named_and_counted(tmp_path: Path) -> None:
    def case(number: int, subject: str, new: str, prompt: str = "{} is located in the city of") -> dict[str, Any]:
        rewrite: dict[str, Any] = {"prompt": prompt, "subject": subject, "relation_id": "P1"}
        rewrite |= {"target_new": {"str": new}, "target_true": {"str": "Paris"}}
        prompts: dict[str, list[str]] = {
            f"{kind}_prompts": [] for kind in ("paraphrase", "neighborhood", "attribute", "generation")
        }
        return {"case_id": number, "requested_rewrite": rewrite, **prompts}

    cases = [case(1, "The Eiffel Tower", "Rome"), case(2, "The Louvre " * 200, "Rome"), case(3, "The Louvre", "Rome")]
    (tmp_path / "mine.json").write_text(json.dumps([*cases, case(4, "Big Ben", "Rome", "no place for it")]))
    done = finished("data=counterfact", "data.path=mine.json", "hydra.run.dir=run", cwd=tmp_path)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["edit"]["count"] == 2 and score_of(record, "counterfact.ES")["n"] == 2
    assert len(record["data"]["failed"]) == 1 and "positions" in record["data"]["failed"][0]
    assert len(record["data"]["rejected"]) == 1 and "mine.json" in record["data"]["rejected"][0]
    assert done.stdout.count("left out:") == 2


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    arguments = command("data.limit=40", "hydra.run.dir=run")
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "run" / "cases.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "finished results are kept" in err
    assert journal.read_bytes().count(b"\n") >= 3
