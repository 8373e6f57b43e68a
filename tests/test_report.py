"""The page: what the record holds stands in it, it is safe and alone, and it says what is wrong with a folder."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest

from editkit import report
from editkit.data import cases
from editkit.errors import ConfigError, OutputError, RecordError
from editkit.metrics.fluency import GENERATION
from editkit.metrics.generation import DISTRACTED
from editkit.report import aggregate, compare, glossary, published, reproduce
from editkit.runs.read import Average, Run, find, metrics_of
from tests.run_folders import RELATIONS, benchmark, lifelong, record

VOID = {"meta", "rect", "line", "path", "circle", "br"}


class Parsed(HTMLParser):
    """Tags, attributes and visible text of a page; `problems`: tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.problems: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.problems += self._open

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag) -> None:
        if tag in VOID:
            return
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"/{tag}")

    def handle_data(self, data) -> None:
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


def edit_folder(folder: Path, prompt="{} is in the city of", subject="The Tower", answer="Rome", **changes) -> Path:
    """A folder of task=edit with one probe."""
    found = record(
        "edit", "r_rome", metrics={"ES_before": 0.0, "ES_after": 1.0, "ES_n": 1, "PS_after": None, "PS_n": 0}
    )
    found["config"]["edit"] = {"prompt": prompt, "subject": subject, "target_new": answer, "target_true": "Paris"}
    found["edit"] = {"rank": 1, "norm": 6.155485984288063, "relative_norm": 0.1797779, "parameters": ["h.4.weight"]}
    found["texts"] = {w: {"top": [[f" {answer}", 0.75]], "continuation": f" {answer} and"} for w in ("before", "after")}
    folder.mkdir(parents=True, exist_ok=True)
    row = {"kind": "rewrite", "prompt": prompt.replace("{}", subject), "target_true": "Paris", "target_new": answer}
    numbers = {"probability_true_before": 0.9984, "probability_true_after": 0.0394}
    numbers |= {"probability_new_before": 0.00013, "probability_new_after": 0.9540}
    row = {name: text.replace("\ud800", "") for name, text in row.items()}  # which Parquet cannot hold
    pandas.DataFrame([row | numbers]).to_parquet(folder / "cases.parquet")
    (folder / "record.json").write_text(json.dumps(found | changes), encoding="utf-8")
    return folder


def test_every_metric_of_the_record_stands_in_the_page(tmp_path: Path) -> None:
    found = benchmark(tmp_path / "run")
    shown = page(tmp_path / "run")
    assert not shown.problems
    for name in ("ES", "PS", "NS", "S", "NM"):
        after = found["metrics"][f"counterfact.{name}_after"]
        row = shown.row(name, 5)
        assert row[2] == f"{after['mean']:.3f} [{after['low']:.3f}, {after['high']:.3f}]"
        assert row[3] == str(after["n"])
    before = found["metrics"]["counterfact.NS_before"]
    assert shown.row("NS", 5)[1].startswith(f"{before['mean']:.3f} [")
    assert shown.row("RS", 5)[1:4] == ["–", "–", "0"]  # a metric that is null
    assert shown.row("GE", 5)[2:4] == [f"{found['metrics']['counterfact.GE_after']['mean']:.3f}", "30"]  # no interval


def test_a_relation_s_average_is_that_of_its_cases(tmp_path: Path) -> None:
    benchmark(tmp_path / "run")
    table = pandas.read_parquet(tmp_path / "run" / "edits.parquet").groupby("relation")["counterfact.PS_after"]
    shown = page(tmp_path / "run")
    for relation in RELATIONS:
        row = shown.row(relation, 4)
        assert row[1] == str(table.count()[relation])
        assert row[3].split()[0] == f"{table.mean()[relation]:.3f}"


def test_worst_cases_are_those_of_lowest_score_with_their_texts(tmp_path: Path) -> None:
    benchmark(tmp_path / "run", good=0.7)
    edits = pandas.read_parquet(tmp_path / "run" / "edits.parquet")
    score = edits[[f"counterfact.{n}_after" for n in ("ES", "PS", "NS")]].mean(axis=1)
    lowest = edits.assign(score=score).sort_values("score", kind="stable").head(10)
    shown = page(tmp_path / "run")
    found = re.findall(r"(\d\.\d{3}) (Subject \d+): Old → New", shown.text)
    assert found == [(f"{s:.3f}", subject) for s, subject in zip(lowest.score, lowest.subject, strict=True)]
    assert f"{lowest.subject.iloc[0]} in phrasing 0 is the {lowest.relation.iloc[0]}" in shown.text
    assert "New. And so on" in shown.text and "Old. And so on" in shown.text


def test_one_edit(tmp_path: Path) -> None:
    shown = page(edit_folder(tmp_path / "run"))
    assert "The Tower is in the city of … Paris → Rome" in shown.text
    assert shown.row("rewrite", 5)[1:] == [
        "The Tower is in the city of", "Paris → Rome", "0.9984 → 0.0394", "0.0001 → 0.9540"
    ]  # fmt: skip
    assert shown.row("ES", 5)[1:4] == ["0.000", "1.000", "1"] and shown.row("PS", 5)[1:4] == ["–", "–", "–"]
    assert "0.1798" in shown.text and "Every compared bit is what it was before." in shown.text


def test_a_run_that_was_not_restored_says_so(tmp_path: Path) -> None:
    unequal = {"exact": False, "unequal": ["h.4.weight"]}
    assert "NOT EQUAL to what it was before." in page(edit_folder(tmp_path / "run", reversal=unequal)).text


def test_lifelong_points_and_collapse(tmp_path: Path) -> None:
    found = lifelong(tmp_path / "run", lasts=200)
    first = next(point["edits"] for point in found["series"] if point["collapsed"])
    shown = page(tmp_path / "run")
    assert f"Collapsed: first called so at {first} edits" in shown.text
    for point in found["series"]:
        row = next(r for r in shown.rows if len(r) > 8 and r[0].strip() == str(point["edits"]))
        assert " ".join(row[1].split()).startswith(f"{point['metrics']['retention.ES']['mean']:.3f} [")
    assert not shown.problems
    labels = [a["aria-label"] for t, a in shown.tags if t == "svg"]
    assert any("singular value over number of the singular value" in label and "update ΔW" in label for label in labels)


def test_the_page_is_alone_and_runs_nothing(tmp_path: Path) -> None:
    benchmark(tmp_path / "a")
    lifelong(tmp_path / "b")
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


def test_texts_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    folder = edit_folder(tmp_path / "<b>run", f"{{}} {HOSTILE}", HOSTILE, HOSTILE)
    plain = page(edit_folder(tmp_path / "plain"))
    shown = page(folder)
    elements = [sorted(t for t, _ in parsed.tags if t != "title") for parsed in (shown, plain)]
    assert elements[0] == elements[1]  # but for the tips of what was shortened, not one more
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    assert HOSTILE in shown.text
    both = page(tmp_path)
    assert "<b>run" in both.text and not {"b", "script"} & {t for t, _ in both.tags}


def test_odd_texts(tmp_path: Path) -> None:
    """Wide letters, right-to-left marks, what no file can hold, and a very long word."""
    long = "x" * 5000
    folder = edit_folder(tmp_path / "run", "{} はどこ \u202e \x00\x1b[31m " + long, "東京タワー \ud800", "ローマ")
    text = report.write(folder).read_text(encoding="utf-8")
    shown = Parsed(text)
    assert "東京タワー" in shown.text and "ローマ" in shown.text and long in shown.text
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", text) and "\ufffd" in text


@pytest.mark.parametrize(
    "missing", ["metrics", "edit", "timings", "texts", "environment", "data", "reversal", "config"]
)
def test_a_part_may_be_missing(tmp_path: Path, missing) -> None:
    folder = edit_folder(tmp_path / "run", **{missing: None})
    assert not page(folder).problems
    found = benchmark(tmp_path / "other")
    found.pop(missing, None)
    (tmp_path / "other" / "record.json").write_text(json.dumps(found))
    assert not page(tmp_path / "other").problems
    assert not page(tmp_path).problems


def test_tables_may_be_missing_or_empty(tmp_path: Path) -> None:
    found = benchmark(tmp_path / "run")
    (tmp_path / "run" / "cases.parquet").unlink()
    assert "The table of probes does not hold this case." in page(tmp_path / "run").text
    (tmp_path / "run" / "edits.parquet").unlink()
    shown = page(tmp_path / "run")
    assert "Worst cases" not in shown.text and f"{found['metrics']['counterfact.ES_after']['mean']:.3f}" in shown.text


def test_nan_is_no_number(tmp_path: Path) -> None:
    found = benchmark(tmp_path / "run")
    found["metrics"]["counterfact.ES_after"] |= {"mean": float("nan")}
    (tmp_path / "run" / "record.json").write_text(json.dumps(found))
    shown = page(tmp_path / "run")
    assert shown.row("ES", 5)[2] == "–" and "nan" not in shown.text.lower().split()


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = benchmark(tmp_path / "10", "rome")
    second = benchmark(tmp_path / "9", "memit", good=0.5)
    shown = page(tmp_path)
    assert "2 runs compared" in shown.text and not shown.problems
    for name, found in (("rome", first), ("memit", second)):
        rows = [[" ".join(c.split()) for c in row] for row in shown.rows if row and row[0].strip() == name]
        metrics = next(row for row in rows if len(row) > 6)
        assert metrics[2].startswith(f"{found['metrics']['counterfact.ES_after']['mean']:.3f} [")
    runs, _ = find([tmp_path])
    assert [run.folder.name for run in runs] == ["9", "10"]  # numbers as numbers
    assert compare._differing(runs) == ["method.name"]  # layer is rome's own


def test_names_of_like_runs_hold_their_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        benchmark(tmp_path / name, "rome", seed=name == "b")
    runs, _ = find([tmp_path])
    assert compare._names(runs, tmp_path) == ["rome (a)", "rome (b)"]
    assert compare._differing(runs) == ["seed"]


def test_bold_is_what_the_best_cannot_be_told_from() -> None:
    found = [Average(0.9, 10, 0.8, 0.95), Average(0.8, 10, 0.7, 0.9), Average(0.5, 10, 0.4, 0.6), None]
    assert compare._best(found, 1) == {0, 1} and compare._best(found, -1) == {2}
    assert compare._best(found, 0) == set() == compare._best([Average(0.9, 10), Average(0.5, 10)], 1)


def test_unfinished_runs_are_listed_with_their_error(tmp_path: Path) -> None:
    benchmark(tmp_path / "0")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "failed.txt").write_text("Layer 77 was asked for\n")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "cases.parquet").write_bytes(b"half")
    shown = page(tmp_path)
    assert shown.row("1")[1] == "Layer 77 was asked for" and "interrupted" in shown.row("2")[1]


def published_run(folder: Path, **changes) -> Run:
    found = benchmark(folder, "rome", model="gpt2-xl", data_name="counterfact", **changes)
    (folder / "record.json").write_text(json.dumps(found))
    return Run.at(folder)


def test_published_numbers_stand_beside_a_run_of_the_same_setting(tmp_path: Path) -> None:
    run = published_run(tmp_path / "run")
    rows = {row.method: row for row in published.matching(run)}
    assert set(rows) == {"", "rome"}
    # ROME, table 4, as METHODS.md has it: 89.2/100.0/96.4/75.4/621.9/41.9
    assert rows["rome"].values == {"S": 0.892, "ES": 1.0, "PS": 0.964, "NS": 0.754, "GE": 6.219, "RS": 0.419}
    shown = page(tmp_path / "run")
    printed = [[" ".join(c.split()) for c in row] for row in shown.rows if row and row[0].strip() == "printed"]
    assert printed[1][1:] == ["0.892", "1.000", "0.964", "0.754", "6.219", "0.419"]
    assert "60 records, there 7,500" in shown.text and "40,000 tokens of 'atlas'" in shown.text
    own = published.own(run, rows[""])
    assert own["ES"].mean == run.record["metrics"]["counterfact.ES_before"]["mean"]


@pytest.mark.parametrize(
    "change", [{"model": "gpt2"}, {"data_name": "zsre"}, {"data_name": "counterfact_flat"}, {"method": "r_rome"}]
)
def test_published_numbers_do_not_stand_beside_another_setting(tmp_path: Path, change) -> None:
    found = {"method": "rome", "model": "gpt2-xl", "data_name": "counterfact"} | change
    benchmark(tmp_path / "run", **found)
    assert [row for row in published.matching(Run.at(tmp_path / "run")) if row.method or "model" in change] == (
        [] if "data_name" in change or "model" in change or "method" in change else None
    )


def test_sequences_are_compared_with_sequences(tmp_path: Path) -> None:
    lifelong(tmp_path / "run", "alphaedit", model="gpt2-xl", data_name="counterfact")
    run = Run.at(tmp_path / "run")
    (row,) = published.matching(run)
    assert row.values == {"ES": 0.995, "PS": 0.9395, "NS": 0.6639}
    assert published.own(run, row)["ES"].mean == run.record["series"][-1]["metrics"]["retention.ES"]["mean"]
    assert "500 edits, there 2,000" in published.differences(run, row)


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
def test_the_command_runs_it_again(tmp_path: Path, words_, expected, alone) -> None:
    found = record("edit", "rome")
    found["environment"]["command"] = ["/somewhere/editkit/run.py", *words_]
    assert reproduce.command(Run(tmp_path, found)) == (expected, alone)


def test_metrics_of_both_shapes() -> None:
    flat = metrics_of({"ES_before": 0.0, "ES_after": 1.0, "ES_n": 3}, "counterfact")
    assert flat["counterfact.ES"].after == Average(1.0, 3) and flat["counterfact.ES"].before == Average(0.0, 3)
    nested = metrics_of({"zsre.efficacy_after": {"mean": 0.5, "n": 2, "low": 0.1, "high": None}, "kl": 0.25})
    assert nested["zsre.efficacy"].after == Average(0.5, 2, 0.1, None) and nested["zsre.efficacy"].before is None
    assert nested["kl"].after == Average(0.25)


def test_an_average_s_interval_holds_the_mean_and_is_the_same_twice() -> None:
    found = aggregate.average([0.0, 1.0, 1.0, None, float("nan"), 1.0])
    assert (found.mean, found.n) == (0.75, 4) and 0 <= found.low <= 0.75 <= found.high <= 1
    assert found == aggregate.average([0.0, 1.0, 1.0, 1.0]) and aggregate.average([None]) is None


def test_kinds_of_probe_are_those_of_the_cases() -> None:
    kinds = {v for k, v in vars(cases).items() if k.isupper() and isinstance(v, str)} - {cases.HOP}  # a group
    assert kinds | {DISTRACTED, GENERATION} == set(glossary.KINDS)


def command(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "editkit.report", *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, timeout=60)  # fmt: skip


def test_the_command_prints_the_page_last_and_needs_no_torch(tmp_path: Path) -> None:
    benchmark(tmp_path / "run")
    code = "import sys; sys.modules.update(torch=None, pandas=None, transformers=None, matplotlib=None)\n"
    code += "from editkit.report.__main__ import main; sys.exit(main(['run']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "run/report.html\n"), done.stderr
    done = command("run", "--out", "elsewhere/page.html", cwd=tmp_path)
    assert done.stdout == "elsewhere/page.html\n" and (tmp_path / "elsewhere/page.html").is_file()


def test_several_folders_make_one_page_beside_them(tmp_path: Path) -> None:
    benchmark(tmp_path / "x" / "a")
    benchmark(tmp_path / "x" / "b" / "0", "memit")
    path = report.write(tmp_path / "x" / "a", tmp_path / "x" / "b")
    assert path == tmp_path / "x" / "report.html" and "2 runs compared" in path.read_text(encoding="utf-8")
    hrefs = [a.get("href") for t, a in Parsed(path.read_text(encoding="utf-8")).tags if t == "a"]
    assert "a/report.html" not in hrefs  # not there
    report.write(tmp_path / "x" / "a")
    shown = Parsed(report.write(tmp_path / "x", to=tmp_path / "y" / "page.html").read_text(encoding="utf-8"))
    assert "../x/a/report.html" in [a.get("href") for t, a in shown.tags if t == "a"]


def broken(folder: Path, name: str, data: bytes) -> None:
    benchmark(folder)
    (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("record.json", b'{"task": "bench'),
        ("record.json", b"\xff\xfe"),
        ("record.json", b"[]"),
        ("record.json", b'{"schema": 1}'),
        ("record.json", b'{"task": "edit", "metrics": [1]}'),
        ("record.json", b'{"task": "edit", "series": [1]}'),
        ("cases.parquet", b"PAR1 half"),
        ("edits.parquet", b""),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data) -> None:
    broken(tmp_path / "run", name, data)
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
def test_a_wrong_request_is_one_line(tmp_path: Path, arguments, code, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    broken(tmp_path / "damaged", "record.json", b"{")
    benchmark(tmp_path / "good", cases=2)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_errors_are_the_family_s(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        report.write(tmp_path / "nowhere")
    benchmark(tmp_path / "run", cases=2)
    with pytest.raises(OutputError):
        report.write(tmp_path / "run", to="/dev/null/page.html")
