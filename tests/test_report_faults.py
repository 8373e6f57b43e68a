"""What a page says of a folder with something missing, damaged or foreign, and the command."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from editkit import report
from editkit.errors import ConfigError, OutputError, RecordError
from tests.pages import cell, page
from tests.run_folders import copied, score_of, setting

PARTS = [
    "scores",
    "metrics",
    "verdict",
    "judge",
    "edit",
    "timings",
    "texts",
    "environment",
    "data",
    "reversal",
    "config",
    "series",
]


@pytest.mark.parametrize("missing", PARTS)
def test_a_part_may_be_missing(real_runs: dict[str, Path], tmp_path: Path, missing: str) -> None:
    for task in ("edit", "benchmark", "lifelong"):
        copied(real_runs[task], tmp_path / task, lambda record: record.pop(missing))
        assert not page(tmp_path / task).problems
    copied(real_runs["edit"], tmp_path / "null", setting(missing, None))
    assert not page(tmp_path / "null").problems
    assert not page(tmp_path).problems


def test_tables_may_be_missing_or_empty(real_runs: dict[str, Path], tmp_path: Path) -> None:
    found = copied(real_runs["benchmark"], tmp_path / "run")
    (tmp_path / "run" / "cases.parquet").unlink()
    assert "The table of prompts does not hold this case." in page(tmp_path / "run").text
    (tmp_path / "run" / "edits.parquet").unlink()
    shown = page(tmp_path / "run")
    assert "Worst cases" not in shown.text and cell(score_of(found, "counterfact.ES")) in shown.row("ES", 5)


def test_nan_is_no_number(real_runs: dict[str, Path], tmp_path: Path) -> None:
    def change(record: dict[str, Any]) -> None:
        score_of(record, "counterfact.ES")["mean"] = float("nan")

    copied(real_runs["benchmark"], tmp_path / "run", change)
    shown = page(tmp_path / "run")
    assert shown.row("ES", 5)[2] == "–" and "nan" not in shown.text.lower().split()


def test_a_metric_that_is_not_registered_here_is_known_from_the_record(
    real_runs: dict[str, Path], tmp_path: Path
) -> None:
    def change(record: dict[str, Any]) -> None:
        for score in record["scores"]:
            score["metric"] = score["metric"].replace("counterfact.NM", "foreign.calm")
        for declared in record["metrics"]:
            if declared["name"] == "counterfact.NM":
                declared |= {"name": "foreign.calm", "short": "calm", "protocol": {"name": "foreign", "title": "Mine"}}

    found = copied(real_runs["benchmark"], tmp_path / "run", change)
    shown = page(tmp_path / "run")
    assert shown.row("calm", 5)[2] == cell(score_of(found, "foreign.calm")) and "Mine" in shown.text
    assert shown.row("calm", 5)[4].startswith("p(old) − p(new)")


def test_another_format_is_refused_in_one_line(real_runs: dict[str, Path], tmp_path: Path) -> None:
    def older(record: dict[str, Any]) -> None:
        record |= {"schema": 1, "metrics": {"ES_after": 1.0}}
        del record["format"]

    copied(real_runs["edit"], tmp_path / "old", older)
    copied(real_runs["edit"], tmp_path / "new", setting("format", 3))
    for name, number in (("old", 1), ("new", 3)):
        with pytest.raises(
            RecordError, match=rf"record.json' was written in format {number} by editkit \d.*Run it again"
        ):
            report.write(tmp_path / name)


def broken(source: Path, folder: Path, name: str, data: bytes) -> None:
    copied(source, folder)
    (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("record.json", b'{"task": "bench'),
        ("record.json", b"\xff\xfe"),
        ("record.json", b"[]"),
        ("record.json", b'{"format": 2}'),
        ("record.json", b'{"task": "edit"}'),
        ("record.json", b'{"task": "edit", "format": 2, "scores": {}}'),
        ("record.json", b'{"task": "edit", "format": 2, "scores": [1]}'),
        ("record.json", b'{"task": "edit", "format": 2, "config": [1]}'),
        ("record.json", b'{"task": "lifelong", "format": 2, "series": [1]}'),
        ("cases.parquet", b"PAR1 half"),
        ("edits.parquet", b""),
    ],
)
def test_a_damaged_file_is_named(real_runs: dict[str, Path], tmp_path: Path, name: str, data: bytes) -> None:
    broken(real_runs["benchmark"], tmp_path / "run", name, data)
    with pytest.raises(RecordError, match=re.escape(str(tmp_path / "run" / name))):
        report.write(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "editkit.report", *arguments], cwd=cwd, capture_output=True,
                          text=True, timeout=60)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["empty"], 1, "No record.json in 'empty': no run has finished there."),
        (["begun"], 1, "1 began and did not finish"),
        (["nowhere"], 2, "'nowhere' is no folder"),
        (["damaged"], 1, "record.json' cannot be read"),
        (["good", "--out", "/dev/null/page.html"], 1, "could not be written"),
        ([], 2, "FOLDER"),
    ],
)
def test_a_wrong_request_is_one_line(
    real_runs: dict[str, Path], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    broken(real_runs["benchmark"], tmp_path / "damaged", "record.json", b"{")
    copied(real_runs["benchmark"], tmp_path / "good")
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_errors_are_the_family_s(real_runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        report.write(tmp_path / "nowhere")
    copied(real_runs["benchmark"], tmp_path / "run")
    with pytest.raises(OutputError):
        report.write(tmp_path / "run", to="/dev/null/page.html")


def test_the_command_prints_the_page_last_and_needs_no_torch(real_runs: dict[str, Path], tmp_path: Path) -> None:
    names = ["run", "edit", "lifelong"]
    for name, task in zip(names, ("benchmark", "edit", "lifelong"), strict=True):
        copied(real_runs[task], tmp_path / name)
    code = "import sys; sys.modules.update(torch=None, pandas=None, transformers=None, matplotlib=None)\n"
    code += f"from editkit.report.__main__ import main; sys.exit(any([main([name]) for name in {names}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, [f"{name}/report.html" for name in names]), done.stderr
    done = command("run", "--out", "elsewhere/page.html", cwd=tmp_path)
    assert done.stdout == "elsewhere/page.html\n" and (tmp_path / "elsewhere/page.html").is_file()
