"""General ability in a run: asked before and after on the model in memory, kept, shown; the bundled tasks' own figures.

Where lm-evaluation-harness is not installed, a plain reading of the bundled tasks stands in for it in the runs, and the
tests of the harness itself are left out.
"""

import gc
import json
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import editkit.tasks.ability as asked_by_tasks
from editkit import Edit, report
from editkit.edits.base import base_of
from editkit.edits.delta import make_delta
from editkit.errors import ConfigError, EditkitError
from editkit.metrics import ability
from editkit.metrics.ability import FACTS, OF_PAPERS, OWN, PROSE, fact_rows, prose_rows, scores_of, tasks_of
from editkit.metrics.harness import Figure, _figures
from editkit.metrics.scoring import score_targets
from editkit.models.architecture import architecture_of
from editkit.models.load import LanguageModel
from editkit.settings import BatchSettings, BenchmarkSettings, EditTaskSettings
from editkit.testing.tiny import byte_level_tokenizer
from tests.run_folders import copied, really_run, record_of, setting

needed = pytest.mark.skipif(find_spec("lm_eval") is None, reason='needs pip install "editkit[harness]"')

LIMIT = 10


def plain(lm: LanguageModel, rows: Sequence[dict[str, Any]]) -> list[float]:
    """Of each row 1.0 where the right choice is the likeliest, by our own scores."""
    found = []
    for row in rows:
        scores = score_targets(lm, [row["prompt"]] * len(row["choices"]), row["choices"])
        found.append(float(max(range(len(scores)), key=lambda i: scores[i].probability) == row["target"]))
    return found


def read_plainly(lm: LanguageModel, preset: str, limit: int | None = None) -> list[Figure]:
    """The bundled tasks without the harness: the share of right choices, and its standard error."""
    found = []
    for task, rows in ((FACTS, fact_rows()), (PROSE, prose_rows())):
        right = plain(lm, rows[:limit])
        error = numpy.std(right, ddof=1) / len(right) ** 0.5
        found.append(Figure(task, "acc", sum(right) / len(right), float(error), len(right)))
    return found


@pytest.fixture
def without_the_harness(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`read_plainly` in its place; the digests of the model when it was asked."""
    digests: list[str] = []

    def asked(lm: LanguageModel, preset: str, limit: int | None = None) -> list[Figure]:
        digests.append(lm.digest)
        return read_plainly(lm, preset, limit)

    monkeypatch.setattr(asked_by_tasks, "ability", asked)
    return digests


# --- the bundled tasks and the presets ------------------------------------------------------------------------


def test_the_bundled_tasks_have_one_right_choice_each(atlas_lm: LanguageModel) -> None:
    for rows in (fact_rows(), prose_rows()):
        assert len(rows) > 100 and all(len(row["choices"]) == len(set(row["choices"])) <= 4 for row in rows)
        assert all(row["prompt"] and 0 <= row["target"] < len(row["choices"]) for row in rows)
        places = {row["target"] for row in rows}
        assert places == {0, 1, 2, 3}
    assert fact_rows() == fact_rows() and sum(plain(atlas_lm, fact_rows()[:LIMIT])) == LIMIT


def test_presets() -> None:
    assert tasks_of("quick", "atlas") == [(OWN, None)]
    assert tasks_of("quick", "gpt2") == [(OWN, None), (("sst2", "rte", "arc_easy"), 100)]
    assert tasks_of("papers", "gpt2", 50) == [(OF_PAPERS, 50)] and "mmlu" in OF_PAPERS
    assert tasks_of("editkit_facts+arc_easy", "gpt2") == [(("editkit_facts", "arc_easy"), None)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EditTaskSettings(ability="quick+"), "task.ability must be quick, papers"),
        (lambda: BatchSettings(ability="quick", ability_limit=0), "task.ability_limit must be positive"),
        (lambda: BenchmarkSettings(ability="quick"), "task=batch has one"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_group_stands_for_its_parts_and_filters_have_names() -> None:
    """From what the harness returns; a tag, which has no figures, shows its tasks."""
    values = {
        "alias": "x",
        "sample_len": 3,
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "f1,none": 0.4,
        "f1_stderr,none": "N/A",
    }
    found = {
        "results": {"mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "mmlu_art": values, "one": values,
                    "math": {"match,strict": 0.1, "match,flexible": 0.2}, "loss": {"bits,none": 1.5}},
        "group_subtasks": {"mmlu": ["mmlu_arts"], "mmlu_arts": ["mmlu_art", "mmlu_law"], "tagged": ["one"]},
        "n-samples": {"mmlu_art": {"effective": 30}, "mmlu_law": {"effective": 12}, "one": {"effective": 3},
                      "math": {"effective": 4}},
        "higher_is_better": {"loss": {"bits": False}},
    }  # fmt: skip
    assert list(_figures(found, ["mmlu", "tagged", "math", "loss"])) == [
        Figure("mmlu", "acc", 0.5, 0.1, 42),
        Figure("one", "acc", 0.5, 0.25, 3),
        Figure("one", "f1", 0.4, None, 3),
        Figure("math", "match (strict)", 0.1, None, 4),
        Figure("math", "match (flexible)", 0.2, None, 4),
        Figure("loss", "bits", 1.5, None, None, more_is_better=False),
    ]


def test_a_score_has_the_harness_s_interval() -> None:
    (score, other) = scores_of([Figure("rte", "acc", 0.6, 0.05, 90), Figure("p", "bits", 2.0, None, 5, False)], "after")
    found = score.average
    assert found is not None and (found.mean, found.n) == (0.6, 90)
    assert (found.low, found.high) == pytest.approx((0.6 - 1.96 * 0.05, 0.6 + 1.96 * 0.05))
    assert score.metric.name == "ability.rte acc" and score.metric.better == 1
    assert other.metric.better == -1 and other.average is not None and other.average.interval is None


# --- through the harness --------------------------------------------------------------------------------------


@needed
def test_the_harness_reads_the_bundled_tasks_as_we_do(atlas_lm: LanguageModel) -> None:
    """With an edit that makes the model wrong at times."""
    left = 0.15 * torch.randn(192, 1, generator=torch.Generator().manual_seed(0))
    delta = make_delta(atlas_lm, "transformer.h.3.mlp.c_proj", left, torch.ones(1, 768))
    states = random.getstate(), torch.random.get_rng_state()
    with Edit((delta,), base_of(atlas_lm)).applied(atlas_lm):
        found = ability.ability(atlas_lm, "quick", 60)
        expected = read_plainly(atlas_lm, "quick", 60)
    assert [(f.task, f.metric, f.n) for f in found] == [(f.task, f.metric, f.n) for f in expected]
    assert [f.value for f in found] == [f.value for f in expected] and 0 < found[0].value < 1
    assert [f.stderr for f in found] == pytest.approx([f.stderr for f in expected])
    assert random.getstate() == states[0] and torch.equal(torch.random.get_rng_state(), states[1])


@needed
def test_no_copy_of_the_model_is_made() -> None:
    """A random model of 100 MB: the harness calls its very parameters, and beside them there are few tensors."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=512, n_layer=8, n_head=8)
    ).eval()
    lm = LanguageModel("random", model, tokenizer, architecture_of("gpt2"))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    places, most = set[tuple[int, ...]](), list[int]()

    def tensors() -> dict[int, int]:
        """Bytes of every tensor that Python holds, by place."""
        found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}

    before = tensors()

    def called(module: Any, args: Any) -> None:
        places.add(tuple(parameter.data_ptr() for parameter in module.parameters()))
        if len(most) < 2:
            most.append(sum(size for place, size in tensors().items() if place not in before))

    with torch.no_grad():
        expected = tuple(parameter.data_ptr() for parameter in model.parameters())
        handle = model.register_forward_pre_hook(called)
        try:
            found = ability.ability(lm, "+".join(OWN), 10)
        finally:
            handle.remove()
    assert weights > 95e6 and places == {expected} and len(found) == 2
    assert max(most) < weights / 20 and sum(before.values()) >= weights


@needed
def test_a_task_that_nobody_has_is_named(atlas_lm: LanguageModel) -> None:
    with pytest.raises(EditkitError, match=r"could not run editkit_fcts.*needs no network"):
        ability.ability(atlas_lm, "editkit_fcts")


# --- in runs --------------------------------------------------------------------------------------------------


def values(record: dict[str, Any], when: str) -> dict[str, float]:
    return {
        s["metric"]: s["mean"] for s in record["scores"] if s["metric"].startswith("ability.") and s["when"] == when
    }


def test_a_batch_asks_before_and_after(tmp_path: Path, without_the_harness: list[str], atlas_lm: LanguageModel) -> None:
    """A wild edit, so that something is lost; asked on the unedited model, and on the edited one."""
    wild = ["method=ft", "method.lr=0.1", "method.steps=3"]
    small = ["task.measure.fluency=0", "task.measure.generate=0", "task.measure.distracted=false"]
    folder = really_run(tmp_path / "run", "task=batch", "data.limit=2", "task.ability=quick",
                        f"task.ability_limit={LIMIT}", *wild, *small)  # fmt: skip
    found = record_of(folder)
    assert (
        len(without_the_harness) == 2 and without_the_harness[0] == found["model"]["digest"] != without_the_harness[1]
    )
    before, after = values(found, "before"), values(found, "after")
    expected = {f"ability.{f.task} acc": f.value for f in read_plainly(atlas_lm, "quick", LIMIT)}
    assert before == expected and set(after) == set(before) and after != before
    assert found["ability"]["preset"] == "quick" and found["ability"]["before"]["figures"][0]["n"] == LIMIT
    assert json.loads((folder / "ability.json").read_text())["after"] == found["ability"]["after"]
    text = report.write(folder).read_text(encoding="utf-8")
    assert "General ability" in text and text.count("editkit_facts acc") == 1 and "Preset quick" in text
    # A run that goes on takes neither again.
    begun = asked_by_tasks.Ability(atlas_lm, _config(resume=True), folder, print)
    begun.take("before")
    begun.take("after")
    assert len(without_the_harness) == 2 and begun.to_json() == found["ability"]
    # Another method's page beside it: general ability is compared too.
    copied(folder, tmp_path / "other", setting("config.method.name", "memit"))
    assert "editkit_prose acc" in report.write(tmp_path).read_text(encoding="utf-8")


def _config(*, resume: bool) -> Any:
    from editkit.config import _composed, to_config

    asked = {"task": "batch", "task.ability": "quick", "task.ability_limit": str(LIMIT), "resume": str(resume).lower()}
    return to_config(_composed(asked))


def test_a_prefix_is_not_seen_and_it_is_said(tmp_path: Path, without_the_harness: list[str]) -> None:
    folder = really_run(
        tmp_path / "run", "method=ike", "task.ability=quick", "task.ability_limit=5", "task.measure.generate=0"
    )
    found = record_of(folder)
    assert len(without_the_harness) == 1 and values(found, "before") and not values(found, "after")
    assert "does not see the prefix" in found["ability"]["after"]["skipped"]
    assert "does not see the prefix" in report.write(folder).read_text(encoding="utf-8")


def test_a_lifelong_run_asks_at_its_end(tmp_path: Path, without_the_harness: list[str]) -> None:
    small = ["data.limit=2", "task.retention=1", "task.untouched=1", "task.measure.generate=0", "task.alarm.facts=1"]
    folder = really_run(tmp_path / "run", "task=lifelong", "task.ability=quick", "task.ability_limit=3",
                        *small, "method=ft_l", "method.steps=2")  # fmt: skip
    found = record_of(folder)
    assert len(without_the_harness) == 2 and set(values(found, "before")) == set(values(found, "after"))
    assert found["protocol"]["edits"] == "stream" and found["protocol"]["total"] == 2
    assert "General ability" in report.write(folder).read_text(encoding="utf-8")


def test_a_shard_has_no_general_ability(atlas_lm: LanguageModel, tmp_path: Path) -> None:
    config = _config(resume=False)
    object.__setattr__(config.data, "shard", "0/2")
    with pytest.raises(ConfigError, match="data.shard=0/2 has a part"):
        asked_by_tasks.Ability(atlas_lm, config, tmp_path, print)
