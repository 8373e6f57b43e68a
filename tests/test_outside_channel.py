"""A metric and a task of another package: one file each, named by entry points, and no file of editkit is touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

import editkit
from editkit.errors import ConfigError
from editkit.metrics.metric import Metric, Protocol, get, register, registered, unregister
from editkit.runs import kinds
from editkit.settings import EditTaskSettings

METRIC = '''
"""words: how many words the model goes on with after the rewrite prompt."""
from editkit.metrics.metric import COUNT, Metric, Protocol, register


def words(rows, when):
    found = [len(row[f"said_{when}"].split()) for row in rows if row["kind"] == "rewrite"]
    return sum(found) / len(found)


register(Metric(Protocol("mine", "Lengths"), "words", "number of words in the continuation", better=0, unit=COUNT,
                range=(0.0, None)), words)
'''

TASK = '''
"""task=greet: says a word."""
from dataclasses import dataclass

from editkit.report.html import Body, Section, Text
from editkit.runs.record import Record, write_record
from editkit.tasks import register


@dataclass(frozen=True)
class GreetSettings:
    name: str = "greet"
    word: str = "hello"


def run(config, folder, say=print):
    say(config.task.word)
    record = Record("greet", {"task": {"name": "greet", "word": config.task.word}}, {}, {}, [], {"exact": True}, {})
    write_record(folder, record)
    return record


def page(run):
    return Body("A greeting", [], [Section("word", "The word", [Text(run.settings["task.word"])])])


register("greet", run, GreetSettings, page=page)
'''

POINTS = "[editkit.metrics]\nwords = outside_words\n\n[editkit.tasks]\ngreet = outside_greet\n"
PACKAGE = Path(editkit.__file__).parent
FAST = ["method.steps=3", "method.contexts.counts=[1,1]", "moments.tokens=2000", "task.measure.fluency=0"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as an installation leaves it: two modules, and the metadata that names them."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "outside_words.py").write_text(METRIC)
    (folder / "outside_greet.py").write_text(TASK)
    metadata = folder / "outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(POINTS)
    return folder


def run(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """What a command prints, with `path` importable."""
    paths = os.pathsep.join(map(str, filter(None, [path, os.environ.get("PYTHONPATH"), PACKAGE.parent])))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_metric_from_outside_is_in_journal_tables_record_and_page(installed: Path, tmp_path: Path) -> None:
    asked = ["task=benchmark", "data.limit=2", "hydra.run.dir=run", *FAST]
    printed = run("-m", "editkit.run", *asked, cwd=tmp_path, path=installed)
    folder = tmp_path / "run"
    assert "mine.words" in printed
    line = json.loads((folder / "cases.jsonl").read_text().splitlines()[1])
    (value,) = [s["value"] for s in line["scores"] if (s["metric"], s["when"]) == ("mine.words", "after")]
    edits = pandas.read_parquet(folder / "edits.parquet")
    assert edits["mine.words_after"][0] == value > 0
    summary = pandas.read_csv(folder / "summary.csv").set_index(["metric", "when"])
    assert summary.loc[("mine.words", "after"), "mean"] == edits["mine.words_after"].mean()
    record = json.loads((folder / "record.json").read_text())
    (declared,) = [each for each in record["metrics"] if each["name"] == "mine.words"]
    assert declared["unit"] == "count" and declared["better"] == 0
    for path in (installed, None):  # where the package is not installed, the record says what the metric is
        run("-m", "editkit.report", "run", cwd=tmp_path, path=path)
        text = (folder / "report.html").read_text()
        assert "number of words in the continuation" in text and "Lengths" in text


def test_a_task_from_outside_runs_and_brings_its_page(installed: Path, tmp_path: Path) -> None:
    asked = ["task=greet", "task.word=ahoy", "hydra.run.dir=run"]
    assert run("-m", "editkit.run", *asked, cwd=tmp_path, path=installed).splitlines()[0] == "ahoy"
    run("-m", "editkit.report", "run", cwd=tmp_path, path=installed)
    text = (tmp_path / "run" / "report.html").read_text()
    assert "A greeting" in text and "ahoy" in text
    run("-m", "editkit.report", "run", cwd=tmp_path)  # without the package: the page that any run has
    assert "greet: ? on ?" in (tmp_path / "run" / "report.html").read_text()


def test_a_name_is_registered_once_and_can_be_taken_out() -> None:
    metric = register(Metric(Protocol("test"), "once", "for a test"), lambda rows, when: 1.0)
    try:
        assert get("test.once") == metric and registered()[-1].metric == metric
        with pytest.raises(ConfigError, match=r"A metric 'test\.once' is registered already"):
            register(Metric(Protocol("test"), "once"))
    finally:
        unregister(metric)
    assert get("test.once") is None
    with pytest.raises(ConfigError, match="A task 'edit' is registered already"):
        kinds.register("edit", "elsewhere:run", EditTaskSettings)
    with pytest.raises(ConfigError, match=r"No task 'edti': did you mean 'edit'\?"):
        kinds.get_task("edti")


def test_every_metric_of_ours_is_declared_whole() -> None:
    for entry in registered():
        metric = entry.metric
        assert metric.meaning and not metric.meaning.endswith("."), metric.name
        assert metric.better in (-1, 0, 1) and metric.averaged and metric.protocol.title, metric.name
        assert Metric.of(json.loads(json.dumps(metric.to_json()))) == metric
