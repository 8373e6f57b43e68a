"""The page of one run: what the record holds stands in it, and it is safe and alone."""

import json
import re
from pathlib import Path
from typing import Any

import pandas
import pytest

from editkit import report
from editkit.metrics.counterfact import ES, NS, PS
from editkit.metrics.metric import registered
from editkit.numbers import mean
from editkit.report import aggregate, reproduce
from editkit.report.series import LIFELONG
from editkit.runs.read import Run
from tests.pages import Change, Parsed, cell, page
from tests.present import present
from tests.run_folders import copied, record_of, score_of, setting


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


def test_few_keys_behind_c_are_told(real_runs: dict[str, Path], tmp_path: Path) -> None:
    copied(real_runs["edit"], tmp_path / "run")  # of 2,000 keys for 768 dimensions
    assert "few keys in C: 10 a dimension or more are advised" in page(tmp_path / "run").text


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
