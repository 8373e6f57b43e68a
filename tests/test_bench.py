"""scripts/bench.py from end to end on a tiny shape: what its JSON says, and that it follows from what was measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts import SCRIPTS

FEW = ["--shapes", "tiny", "--edits", "2", "--records", "2", "--keys", "256", "--repeats", "1", "--threads", "1"]
ROWS = ["one_edit", "many_edits", "memit", "evaluation", "trace", "moments"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench.py"), *FEW, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def measured(file: Path, *arguments: str) -> dict[str, Any]:
    done = run("--json", str(file), *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def check(found: dict[str, Any], device: str) -> None:
    assert next(iter(found)) == "ratios"
    assert list(found["ratios"]) == ROWS
    own = found["shapes"]["tiny"]
    assert found["ratios"] == own["ratios"]
    for name, row in own["rows"].items():
        full, fast = row["full"], row["fast"]
        assert row["ratio"] == found["ratios"][name] == pytest.approx(full["seconds"] / fast["seconds"])
        assert row["share_of_counted"] == pytest.approx(row["ratio"] / row["ratio_counted"])
        assert row["ratio_counted"] > 1 and row["share_of_floor"] > 0
        assert full["flop"] > fast["flop"] > 0
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["matrix_gflops"] > 0
    assert (found["machine"]["device"] == "cpu") is (device == "cpu")
    assert found["settings"]["device"] == device


def test_every_row_and_its_counts(tmp_path: Path) -> None:
    found = measured(tmp_path / "bench.json", "--device", "cpu", "--evaluations", "3,2", "--solver", "adam")
    check(found, "cpu")
    rows = found["shapes"]["tiny"]["rows"]
    assert list(rows) == ROWS
    for name in ("one_edit", "many_edits", "memit"):
        assert rows[name]["full"]["evaluations"] == rows[name]["fast"]["evaluations"] == 3
        assert rows[name]["ratio_an_evaluation"] == pytest.approx(rows[name]["ratio"])
    assert [rows[name]["fast"]["facts"] for name in ROWS] == [1, 2, 4, 2, 1, 1]
    assert rows["trace"]["fast"]["evaluations"] is None


@pytest.mark.slow
def test_descent_takes_fewer_evaluations(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--evaluations", "4,2", "--solver", "descent", "--rows", "one_edit,memit"]
    for row in measured(tmp_path / "bench.json", *arguments)["shapes"]["tiny"]["rows"].values():
        assert (row["full"]["evaluations"], row["fast"]["evaluations"]) == (4, 2)
        assert row["ratio_an_evaluation"] == pytest.approx(row["ratio"] / 2)


@pytest.mark.slow
def test_rows_can_be_picked(tmp_path: Path) -> None:
    found = measured(tmp_path / "bench.json", "--rows", "trace", "--shapes", "tiny,atlas", "--device", "cpu")
    assert list(found["shapes"]) == ["tiny", "atlas"]
    assert [list(each["rows"]) for each in found["shapes"].values()] == [["trace"]] * 2
    assert found["ratios"]["one_edit"] is None and found["ratios"]["trace"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "edit"], "--rows takes one_edit, "),
        (["--shapes", "gpt5"], "--shapes takes gpt2-small, "),
        (["--evaluations", "20"], "--evaluations takes two numbers, as in 20,7, or own; found 20"),
        (["--records", "0"], "take 1 or more"),
    ],
)
def test_what_it_cannot_do_it_says(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(dtype: str, tmp_path: Path) -> None:
    found = measured(tmp_path / "bench.json", "--device", "cuda", "--dtype", dtype, "--evaluations", "3,2")
    check(found, "cuda")
    for row in found["shapes"]["tiny"]["rows"].values():
        assert row["fast"]["peak_mib"] > 0
