"""The protocol that a record states, from the configuration; and how several are told apart."""

from types import SimpleNamespace

import pytest

from editkit.config import _composed, prepare, to_config
from editkit.runs.protocol import LABELS, RunProtocol, difference, differing, named, told
from editkit.settings import Config


def configured(*overrides: str) -> Config:
    return to_config(_composed(dict(text.split("=", 1) for text in prepare(list(overrides)))))


@pytest.mark.parametrize(
    ("overrides", "cases", "expected"),
    [
        ((), 1, ("single", 1, 1)),
        (("task=benchmark",), 20, ("single", 1, 1)),
        (("task=benchmark", "task.size=5"), 20, ("batch", 5, 5)),
        (("task=benchmark", "task.size=5"), 3, ("batch", 3, 3)),
        (("task=batch",), 20, ("batch", 20, 20)),
        (("task=lifelong",), 20, ("stream", 1, 20)),
        (("task=lifelong", "task.step=10", "task.every=10"), 20, ("stream", 10, 20)),
    ],
)
def test_how_it_edits(overrides: tuple[str, ...], cases: int, expected: tuple[str, int, int]) -> None:
    found = RunProtocol.of(configured(*overrides), cases)
    assert (found.edits, found.together, found.total) == expected
    words = {"single": "after each edit", "batch": "after the one edit", "stream": "after all edits"}
    assert found.measured.startswith(words[found.edits])


def test_how_it_asks() -> None:
    found = RunProtocol.of(configured("task=benchmark", "task.measure.natural=16", "task.measure.form=qa"), 3)
    assert found.answers == "teacher-forced and free" and found.form == "qa" and found.judge == "exact"
    assert found.stop.startswith("2 tokens behind the longest answer") and "16 tokens at most" in found.stop
    assert "'.' or '\\n'" in found.stop
    prefix = RunProtocol.of(configured("task=benchmark", "task.measure.natural=0"), 3)
    assert "natural" not in prefix.stop and "prefix match" in prefix.stop
    forced = RunProtocol.of(configured("task=benchmark", "task.measure.generate=0"), 3)
    assert (forced.answers, forced.stop, forced.form, forced.judge) == ("teacher-forced", "", "", "")
    assert set(found.to_json()) == set(LABELS)


def test_a_judge_that_the_task_names_is_stated() -> None:
    measure = SimpleNamespace(generate=2, natural=32, form="bare")
    task = SimpleNamespace(measure=measure, judge="model:some/folder")
    assert RunProtocol.of(SimpleNamespace(task=task), 1).judge == "model:some/folder"  # type: ignore[arg-type]
    task.judge = None
    assert RunProtocol.of(SimpleNamespace(task=task), 1).judge == "exact"  # type: ignore[arg-type]


def test_differences_are_named_by_field_and_value() -> None:
    one, two = (RunProtocol.of(configured(f"task={name}"), 20).to_json() for name in ("benchmark", "batch"))
    assert differing([one, one]) == [] and difference([one, dict(one)]) == ""
    assert differing([one, two]) == ["edits", "together", "total", "measured"]
    said = difference([one, two, one])
    assert said.startswith("These runs follow 2 protocols") and "edits (single | batch)" in said
    assert "cases in one edit (1 | 20)" in said and "judge" not in said
    assert named(two, ["edits", "total"]) == "edits: batch; cases edited when measured: 20"
    assert named({}, ["edits"]) == "protocol not stated" and "edits (single | not stated)" in difference([one, {}])
    assert [label for label, _ in told(one)] == list(LABELS.values())
