"""The page: what the record holds stands in it, it is safe and alone, and it says what is wrong with a folder."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pytest

from editkit import report
from editkit.errors import ConfigError, OutputError, RecordError
from editkit.metrics.counterfact import ES, NS, PS
from editkit.metrics.fluency import GE, RS
from editkit.metrics.metric import RETENTION, Average, registered
from editkit.numbers import mean
from editkit.report import aggregate, compare, published, reproduce
from editkit.report.series import LIFELONG
from editkit.runs.read import Run, find
from tests.present import present
from tests.run_folders import copied, record_of, score_of, setting

Change = Callable[[dict[str, Any]], None]  # of a run's record

VOID = {"meta", "rect", "line", "path", "circle", "br"}


class Parsed(HTMLParser):
    """Tags, attributes and visible text of a page; `problems`: tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.problems: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.problems += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._keep(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._keep(tag, attrs)

    def _keep(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)
            if "td" in self._open or "th" in self._open:
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, first: str, cells: int = 2) -> list[str]:
        """The first row of at least so many cells that begins with `first`."""
        found = [[" ".join(c.split()) for c in row] for row in self.rows if len(row) >= cells]
        return next(row for row in found if row[0] == first)


def page(folder: Path) -> Parsed:
    return Parsed(report.write(folder).read_text(encoding="utf-8"))


def texts(prompt: str, subject: str, answer: str) -> Change:
    """A change of an edit's record: the texts of its fact, and what the model says."""

    def change(record: dict[str, Any]) -> None:
        record["config"]["edit"] |= {"prompt": prompt, "subject": subject, "target_new": answer}
        look = {"top": [[f" {answer}", 0.75]], "continuation": f" {answer} and"}
        record["texts"] = {"before": look, "after": look}

    return change


def edit_folder(
    source: Path, target: Path, prompt: str = "{} is in", subject: str = "The Tower", answer: str = "Rome"
) -> Path:
    """A copy of a folder of task=edit with other texts, in its table too."""
    copied(source, target, texts(prompt, subject, answer))
    cases = pandas.read_parquet(target / "cases.parquet")
    plain = [text.replace("\ud800", "") for text in (prompt.replace("{}", subject), answer)]  # Parquet cannot hold it
    first = cases.kind == "rewrite"
    cases.loc[first, "prompt"], cases.loc[first, "target_new"] = plain
    cases[first].to_parquet(target / "cases.parquet")
    return target


def cell(score: dict[str, Any]) -> str:
    """A score as a cell of a table."""
    bounds = "" if score["n"] == 1 else f" [{mean(score['low'])}, {mean(score['high'])}]"
    return mean(score["mean"]) + bounds


def test_every_metric_of_the_record_stands_in_the_page(real_runs: dict[str, Path], tmp_path: Path) -> None:
    found = copied(real_runs["benchmark"], tmp_path / "run")
    shown = page(tmp_path / "run")
    assert not shown.problems
    rows = [[" ".join(c.split()) for c in row] for row in shown.rows if len(row) == 5]
    for score in found["scores"]:
        short, place = score["metric"].partition(".")[2], {"before": 1, "after": 2}[score["when"]]
        mine = [row for row in rows if row[0] == short]  # EasyEdit and CounterFact both have a portability
        assert cell(score) in [row[place] for row in mine], score
        assert str(score["n"]) in [row[3] for row in mine]
    meanings = {entry.metric.label: entry.metric.meaning for entry in registered()}
    assert shown.row("NM", 5)[4] == meanings["NM"] and all(entry.metric.meaning for entry in registered())


def test_a_relation_s_average_is_that_of_its_cases(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["benchmark"], tmp_path / "run")
    table = pandas.read_parquet(tmp_path / "run" / "edits.parquet").groupby("relation")[PS.column()]
    shown = page(tmp_path / "run")
    for relation, values in table:
        row = shown.row(str(relation), 4)
        assert row[1] == str(values.count())
        assert row[3].split()[0] == f"{values.mean():.3f}"


def test_worst_cases_are_those_of_lowest_score_with_their_texts(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["benchmark"], tmp_path / "run")
    edits = pandas.read_parquet(tmp_path / "run" / "edits.parquet")
    score = edits[[metric.column() for metric in (ES, PS, NS)]].mean(axis=1)
    lowest = edits.assign(score=score).sort_values("score", kind="stable")
    rewrites = pandas.read_parquet(tmp_path / "run" / "cases.parquet").query("kind == 'rewrite'").set_index("case")
    shown = page(tmp_path / "run")
    expected = [
        f"{s:.3f} {subject}: {rewrites.target_true[case]} → {rewrites.target_new[case]}"
        for s, subject, case in zip(lowest.score, lowest.subject, lowest.case, strict=True)
    ]
    places = [shown.text.index(text) for text in expected]
    assert places == sorted(places) and len(places) == 3
    assert rewrites.said_after.iloc[0].split()[0] in shown.text


def test_one_edit(real_runs: dict[str, Path], tmp_path: Path) -> None:
    found = copied(real_runs["edit"], tmp_path / "run")
    shown = page(tmp_path / "run")
    assert "The Eiffel Tower is located in the city of … Paris → Rome" in shown.text and not shown.problems
    row = pandas.read_parquet(tmp_path / "run" / "cases.parquet").iloc[0]
    arrows = [f"{row[f'probability_{w}_before']:.4f} → {row[f'probability_{w}_after']:.4f}" for w in ("true", "new")]
    first = shown.row("rewrite", 7)  # the table of prompts
    assert first[1:3] == ["The Eiffel Tower is located in the city of", "Paris → Rome"]
    assert first[3] == arrows[0] and "→" in first[4]
    assert shown.row("ES", 5)[1:4] == [cell(score_of(found, "counterfact.ES", w)) for w in ("before", "after")] + ["1"]
    assert "Every compared bit is what it was before." in shown.text and "said before" not in shown.text


def test_a_page_says_whether_the_edit_landed_and_what_to_try(real_runs: dict[str, Path], tmp_path: Path) -> None:
    """The fixture takes four steps only: whatever came of it, record and page say the same."""
    found = copied(real_runs["edit"], tmp_path / "run")["verdict"]
    shown = page(tmp_path / "run")
    assert found["summary"].startswith("The edit ") and found["summary"] in shown.text
    assert found["landed"] or (found["reasons"] and found["try_"])
    assert all(text in shown.text for text in (*found["reasons"], *found["try_"]))


def test_one_edit_is_a_benchmark_of_one_case(real_runs: dict[str, Path]) -> None:
    one, many = (pandas.read_parquet(real_runs[task] / "cases.parquet") for task in ("edit", "benchmark"))
    texts_only = {"text_before", "text_after"}  # of sampled texts: a column where there are any
    assert list(one.columns) == [name for name in many.columns if name not in texts_only]
    first, second = (Run.at(real_runs[task]) for task in ("edit", "benchmark"))
    assert {ES, PS, NS} <= set(first.sides()) & set(second.sides())
    assert set(first.sides()) - set(second.sides()) <= {entry.metric for entry in registered()}


def test_the_exact_judge_is_the_rule_of_natural_stop(real_runs: dict[str, Path], tmp_path: Path) -> None:
    """Under task.judge=exact both protocols are one, and each answer has its line; other runs know no judge."""
    record = copied(real_runs["lifelong"], tmp_path / "run")
    means = {(s["metric"], s["when"], s["asked"]): s.get("mean") for s in record["scores"] if "asked" in s}
    named = [(name, *rest) for name, *rest in means if name.startswith("judged.")]
    assert {"judged.rewrite", "judged.neighborhood", "judged.paraphrase"} <= {name for name, *_ in named}
    assert all(means[name, when, asked] == means[name.replace("judged", "natural"), when, asked]
               for name, when, asked in named)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "judged.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == record["judge"]["asked"] and {line["edits"] for line in lines} == {0, 2, 4, 6}
    assert record["judge"]["tokens"] == 0 and not any("judged" in point for point in record["series"])
    assert "free answers were judged by exact (prompt version 1)" in page(tmp_path / "run").text
    for task in ("edit", "benchmark"):
        assert record_of(real_runs[task])["judge"] is None and not (real_runs[task] / "judged.jsonl").exists()
        assert not [name for name in pandas.read_parquet(real_runs[task] / "cases.parquet") if "judged" in name]


def test_a_run_that_was_not_restored_says_so(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["edit"], tmp_path / "run", setting("reversal", {"exact": False, "unequal": ["h.4.weight"]}))
    assert "NOT EQUAL to what it was before." in page(tmp_path / "run").text


def collapsed(record: dict[str, Any]) -> None:
    for point in record["series"][2:]:
        point["collapsed"] = True


def test_the_page_of_a_lifelong_run(real_runs: dict[str, Path], tmp_path: Path) -> None:
    found = copied(real_runs["lifelong"], tmp_path / "run", collapsed)
    text = report.write(tmp_path / "run").read_text(encoding="utf-8")
    shown = Parsed(text)
    assert not shown.problems and "Collapsed: first called so at 4 edits" in shown.text
    for name in ("ES", "PS", "NS"):  # the tiles
        score = score_of(found["series"][-1], f"counterfact.{name}", asked="retention")
        assert f"{name} at the end {mean(score['mean'])}" in shown.text
    untouched = score_of(found["series"][-1], "counterfact.NS", asked="untouched")
    assert f"untouched at the end {mean(untouched['mean'])}" in shown.text
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles == [chosen.title for chosen in LIFELONG] and len(titles) <= 8
    names = [title + chosen.axis for title, chosen in zip(titles, LIFELONG, strict=True)]
    assert not any("_" in name or "counterfact" in name for name in names)
    for point in found["series"][1:]:
        row = next(r for r in shown.rows if len(r) > 8 and r[0].strip() == str(point["edits"]))
        assert " ".join(row[1].split()) == cell(score_of(point, "counterfact.ES", asked="retention"))
    # What is no chart stands in a table, at every point.
    along = shown.row("counterfact.NM", 4)
    assert len(along) == 2 + len(found["series"]) + 1


def test_the_page_is_alone_and_runs_nothing(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["benchmark"], tmp_path / "a")
    copied(real_runs["lifelong"], tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path):
        text = report.write(folder).read_text(encoding="utf-8")
        shown = Parsed(text)
        assert not {"script", "img", "iframe", "object", "link", "form"} & {tag for tag, _ in shown.tags}
        links = [a[k] for _, a in shown.tags for k in ("href", "src", "xlink:href") if k in a]
        assert all(link.startswith("#") or link in ("a/report.html", "b/report.html") for link in links)
        assert not re.search(r"url\(|@import|@font-face", text)
        policy = next(a["content"] for t, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'")


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&</text></svg>{{ 7*7 }}"


def test_texts_are_shown_and_never_obeyed(real_runs: dict[str, Path], tmp_path: Path) -> None:
    folder = edit_folder(real_runs["edit"], tmp_path / "<b>run", f"{{}} {HOSTILE}", HOSTILE, HOSTILE)
    plain = page(edit_folder(real_runs["edit"], tmp_path / "plain"))
    shown = page(folder)
    elements = [sorted(t for t, _ in parsed.tags if t != "title") for parsed in (shown, plain)]
    assert elements[0] == elements[1]  # but for the tips of what was shortened, not one more
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    assert HOSTILE in shown.text
    both = page(tmp_path)
    assert "<b>run" in both.text and not {"b", "script"} & {t for t, _ in both.tags}


def test_odd_texts(real_runs: dict[str, Path], tmp_path: Path) -> None:
    """Wide letters, right-to-left marks, what no file can hold, and a very long word."""
    long = "x" * 5000
    odd = "{} はどこ \u202e \x00\x1b[31m " + long
    folder = edit_folder(real_runs["edit"], tmp_path / "run", odd, "東京タワー \ud800", "ローマ")
    text = report.write(folder).read_text(encoding="utf-8")
    shown = Parsed(text)
    assert "東京タワー" in shown.text and "ローマ" in shown.text and long in shown.text
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", text) and "\ufffd" in text


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


def like_a_paper(model: str = "gpt2-xl", data: str = "counterfact", method: str = "rome") -> Change:
    """A change of a record: as if it were of another model, data set and method."""

    def change(record: dict[str, Any]) -> None:
        record["model"]["name"] = record["config"]["model"]["name"] = model
        record["config"]["data"]["name"], record["config"]["method"]["name"] = data, method

    return change


def test_few_keys_behind_c_are_told(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["edit"], tmp_path / "run")  # of 2,000 keys for 768 dimensions
    assert "few keys in C: 10 a dimension or more are advised" in page(tmp_path / "run").text


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


@pytest.mark.parametrize(
    ("words_", "expected", "alone"),
    [
        (["edit=gpt2_fact", "hydra.run.dir=runs/x"], "python -m editkit.run edit=gpt2_fact", True),
        (["edit.subject=Big Ben"], "python -m editkit.run 'edit.subject=Big Ben'", True),
        (
            ["-m", "method=rome,memit", "seed=0,1", "hydra.sweep.dir=s"],
            "python -m editkit.run method=rome seed=0",
            True,
        ),
        (["-m", "edit=a,b", "seed=0"], "python -m editkit.run -m edit=a,b seed=0", False),
        (["-m", "seed=range(3)"], "python -m editkit.run -m 'seed=range(3)'", False),
    ],
)
def test_the_command_runs_it_again(
    real_runs: dict[str, Path], tmp_path: Path, words_: list[str], expected: str, alone: bool
) -> None:
    found = record_of(real_runs["edit"])
    found["config"]["method"]["name"] = "rome"
    found["environment"]["command"] = ["/somewhere/editkit/run.py", *words_]
    assert reproduce.command(Run(tmp_path, found)) == (expected, alone)


def test_an_average_s_interval_holds_the_mean_and_is_the_same_twice() -> None:
    found = present(aggregate.average([0.0, 1.0, 1.0, None, float("nan"), 1.0]))
    low, high = present(found.interval)
    assert (found.mean, found.n) == (0.75, 4) and 0 <= low <= 0.75 <= high <= 1
    assert found == aggregate.average([0.0, 1.0, 1.0, 1.0]) and aggregate.average([None]) is None


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "editkit.report", *arguments], cwd=cwd, capture_output=True,
                          text=True, timeout=60)  # fmt: skip


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
