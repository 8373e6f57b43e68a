"""Runs side by side on one page, and beside published numbers."""

from pathlib import Path
from typing import Any

import pytest

from editkit import report
from editkit.metrics.counterfact import ES
from editkit.metrics.fluency import GE, RS
from editkit.metrics.metric import RETENTION, Average
from editkit.report import compare, published
from editkit.report.series import LIFELONG
from editkit.runs.read import Run, find
from tests.pages import Change, Parsed, cell, page
from tests.run_folders import copied, score_of, setting


def other_method(record: dict[str, Any]) -> None:
    record["config"]["method"]["name"] = "memit"


def test_runs_side_by_side(real_runs: dict[str, Path], tmp_path: Path) -> None:
    first = copied(real_runs["benchmark"], tmp_path / "10")
    second = copied(real_runs["benchmark"], tmp_path / "9", other_method)
    shown = page(tmp_path)
    assert "2 runs compared" in shown.text and not shown.problems
    for name, found in (("r_rome", first), ("memit", second)):
        rows = [[" ".join(c.split()) for c in row] for row in shown.rows if row and row[0].strip() == name]
        metrics = next(row for row in rows if len(row) > 6 and row[1] == "3")
        assert metrics[2] == cell(score_of(found, "counterfact.ES"))
    runs, _ = find([tmp_path])
    assert [run.folder.name for run in runs] == ["9", "10"]  # numbers as numbers
    assert compare._differing(runs) == ["method.name"]


def test_lifelong_runs_are_overlaid(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["lifelong"], tmp_path / "a")
    copied(real_runs["lifelong"], tmp_path / "b", other_method)
    shown = page(tmp_path)
    labels = [a["aria-label"] for t, a in shown.tags if t == "svg"]
    assert len([label for label in labels if "over edits" in label]) == len(LIFELONG) and not shown.problems
    assert "r_rome from" in labels[-1] and "memit from" in labels[-1]


def test_names_of_like_runs_hold_their_folder(real_runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        copied(real_runs["benchmark"], tmp_path / name, setting("config.seed", int(name == "b")))
    runs, _ = find([tmp_path])
    assert compare._names(runs, tmp_path) == ["r_rome (a)", "r_rome (b)"]
    assert compare._differing(runs) == ["seed"]


def test_bold_is_what_the_best_cannot_be_told_from() -> None:
    found = [Average(0.9, 10, 0.8, 0.95), Average(0.8, 10, 0.7, 0.9), Average(0.5, 10, 0.4, 0.6), None]
    assert compare._best(found, 1) == {0, 1} and compare._best(found, -1) == {2}
    assert compare._best(found, 0) == set() == compare._best([Average(0.9, 10), Average(0.5, 10)], 1)


def test_unfinished_runs_are_listed_with_their_error(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["benchmark"], tmp_path / "0")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "failed.txt").write_text("Layer 77 was asked for\n")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "cases.parquet").write_bytes(b"half")
    shown = page(tmp_path)
    assert shown.row("1")[1] == "Layer 77 was asked for" and "interrupted" in shown.row("2")[1]


def test_several_folders_make_one_page_beside_them(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["benchmark"], tmp_path / "x" / "a")
    copied(real_runs["benchmark"], tmp_path / "x" / "b" / "0", other_method)
    path = report.write(tmp_path / "x" / "a", tmp_path / "x" / "b")
    assert path == tmp_path / "x" / "report.html" and "2 runs compared" in path.read_text(encoding="utf-8")
    hrefs = [a.get("href") for t, a in Parsed(path.read_text(encoding="utf-8")).tags if t == "a"]
    assert "a/report.html" not in hrefs  # not there
    report.write(tmp_path / "x" / "a")
    shown = Parsed(report.write(tmp_path / "x", to=tmp_path / "y" / "page.html").read_text(encoding="utf-8"))
    assert "../x/a/report.html" in [a.get("href") for t, a in shown.tags if t == "a"]


def like_a_paper(model: str = "gpt2-xl", data: str = "counterfact", method: str = "rome") -> Change:
    """A change of a record: as if it were of another model, data set and method."""

    def change(record: dict[str, Any]) -> None:
        record["model"]["name"] = record["config"]["model"]["name"] = model
        record["config"]["data"]["name"], record["config"]["method"]["name"] = data, method

    return change


def test_published_numbers_stand_beside_a_run_of_the_same_setting(real_runs: dict[str, Path], tmp_path: Path) -> None:
    found = copied(real_runs["benchmark"], tmp_path / "run", like_a_paper())
    run = Run.at(tmp_path / "run")
    rows = {row.method: row for row in published.matching(run)}
    assert set(rows) == {"", "rome"}
    # ROME, table 4, as METHODS.md has it: 89.2/100.0/96.4/75.4/621.9/41.9
    values = {metric.short: value for metric, value in rows["rome"].values.items()}
    assert values == {"S": 0.892, "ES": 1.0, "PS": 0.964, "NS": 0.754, "GE": 6.219, "RS": 0.419}
    assert {GE, RS} <= set(rows["rome"].values)
    shown = page(tmp_path / "run")
    printed = [[" ".join(c.split()) for c in row] for row in shown.rows if row and row[0].strip() == "printed"]
    assert printed[1][1:] == ["0.892", "1.000", "0.964", "0.754", "6.219", "0.419"]
    mine = [[" ".join(c.split()) for c in row] for row in shown.rows if row and row[0].strip() == "this run"]
    assert mine[1][2] == cell(score_of(found, "counterfact.ES"))
    assert "3 records, there 7,500" in shown.text and "2,000 tokens of 'atlas'" in shown.text
    assert published.own(run, rows[""])[ES].mean == score_of(found, "counterfact.ES", "before")["mean"]


@pytest.mark.parametrize(
    "other", [{"model": "gpt2"}, {"data": "zsre"}, {"data": "counterfact_flat"}, {"method": "r_rome"}]
)
def test_published_numbers_do_not_stand_beside_another_setting(
    real_runs: dict[str, Path], tmp_path: Path, other: dict[str, str]
) -> None:
    copied(real_runs["benchmark"], tmp_path / "run", like_a_paper(**other))
    assert not [row for row in published.matching(Run.at(tmp_path / "run")) if row.method or "model" in other]


def test_sequences_are_compared_with_sequences(real_runs: dict[str, Path], tmp_path: Path) -> None:
    found = copied(real_runs["lifelong"], tmp_path / "run", like_a_paper(method="alphaedit"))
    run = Run.at(tmp_path / "run")
    (row,) = published.matching(run)
    assert {metric.short: value for metric, value in row.values.items()} == {"ES": 0.995, "PS": 0.9395, "NS": 0.6639}
    last = score_of(found["series"][-1], "counterfact.ES", asked=RETENTION)
    assert published.own(run, row)[ES].mean == last["mean"] and "alphaedit, arXiv" in page(tmp_path / "run").text
    assert "6 edits, there 2,000" in published.differences(run, row)
