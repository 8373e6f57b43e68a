"""Null controls: what each one is, measured case by case, the same after a kill; in record, tables and page."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from editkit import Edit, report
from editkit.config import _composed, prepare, to_config
from editkit.data.atlas import atlas_benchmark
from editkit.edits.base import base_of
from editkit.edits.delta import make_delta
from editkit.methods import get_method, names
from editkit.methods.r_rome import r_rome
from editkit.methods.shared.controls import Control, moved_blocks, null_controls, random_like
from editkit.metrics.counterfact import ES, NS, PS, S
from editkit.metrics.paired import paired
from editkit.metrics.scoring import score_probes
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.runs import collect
from editkit.runs.kinds import get_task
from editkit.runs.read import Run
from editkit.settings import CONTROLS, Config, ContextSettings, MomentSettings
from tests.present import present
from tests.run_folders import copied, record_of, score_of, setting

ASKED: tuple[str, ...] = ("task=benchmark", "data.limit=2", "task.measure.fluency=0", "task.measure.generate=0")
ASKED += (
    "task.measure.distracted=false",
    "task.controls=true",
    "task.keep_edits=true",
    "method.steps=3",
    "method.contexts.counts=[1,1]",
    "moments.tokens=2000",
)
TABLES = ("summary.csv", "cases.parquet", "control_cases.parquet")


def configured(*overrides: str, asked: Sequence[str] = ASKED) -> Config:
    return to_config(_composed(dict(text.split("=", 1) for text in prepare([*asked, *overrides]))))


def run(folder: Path, *overrides: str, asked: Sequence[str] = ASKED) -> str:
    """Run the task in `folder`; what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    config = configured(*overrides, asked=asked)
    get_task(config.task.name).load()(config, folder, say=lines.append)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two cases with all controls, and what it printed."""
    folder = tmp_path_factory.mktemp("controls") / "whole"
    return folder, run(folder)


# --- what they are --------------------------------------------------------------------------------------------


def test_the_wrong_block_is_as_far_as_the_rule_says() -> None:
    for layers in range(1, 14):
        for first in range(layers):
            for last in range(first, layers):
                blocks = tuple(range(first, last + 1))
                moved = moved_blocks(blocks, layers)
                room = max(first, layers - 1 - last)
                if min(room, layers // 2) < len(blocks):
                    assert moved == ()
                    continue
                assert set(moved) <= set(range(layers)) and not set(moved) & set(blocks)
                assert {abs(new - old) for new, old in zip(moved, blocks, strict=True)} == {min(room, layers // 2)}


def some_edit(lm: LanguageModel, rank: int | None) -> Edit:
    """A random change of one weight of the atlas model; rank None: dense."""
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(192, rank or 768, generator=generator), torch.randn(rank or 1, 768, generator=generator)
    delta = make_delta(lm, down_of(lm, 2), left, right if rank else None)
    return Edit((delta,), base_of(lm), {"method": "ft"}, memory={"keys": left})


@pytest.mark.parametrize("rank", [1, 3, None])
def test_a_random_delta_keeps_norm_keys_and_spectrum(atlas_lm: LanguageModel, rank: int | None) -> None:
    edit = some_edit(atlas_lm, rank)
    found = random_like(edit, "0|0")
    (before,), (after,) = edit.deltas, found.deltas
    old, new = before.change(), after.change()
    assert new.norm().item() == pytest.approx(old.norm().item(), rel=1e-6) and found.memory == {}
    if rank is not None:
        assert torch.equal(present(after.right), present(before.right))  # the keys
    torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(old), rtol=1e-5, atol=1e-4)
    # ΔW = Q ΔW₀ keeps ΔWᵀ ΔW: what two keys are given keeps its size and angle.
    torch.testing.assert_close(new.T @ new, old.T @ old, rtol=1e-4, atol=1e-2)
    assert abs(torch.cosine_similarity(new.flatten(), old.flatten(), dim=0).item()) < 0.3
    assert random_like(edit, "0|0").to_bytes() == found.to_bytes() != random_like(edit, "0|1").to_bytes()


def test_random_values_point_everywhere_alike(atlas_lm: LanguageModel) -> None:
    """The mean of unit vectors drawn evenly is 0; of a rotation drawn without its sign correction it is not."""
    edit = some_edit(atlas_lm, 1)
    drawn = torch.stack([random_like(edit, str(i)).deltas[0].left[:, 0].double() for i in range(400)])
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    assert drawn.mean(0).abs().max().item() < 5 / (400 * 192) ** 0.5
    assert (drawn**2).mean(0).sum().item() == pytest.approx(1)


def found_for(method: str, moments: MomentSettings | None = None, layers: int = 8) -> dict[str, Control]:
    settings = get_method(method).settings()
    found = null_controls(method, settings, moments or MomentSettings(), "atlas", layers)
    return {control.name: control for control in found}


def test_every_method_has_each_control_or_says_why_not() -> None:
    for method in names():
        found = found_for(method)
        assert list(found) == list(CONTROLS)
        assert all(bool(control.how) != bool(control.skipped) for control in found.values()), method
    of_rome = found_for("r_rome")
    assert not any(control.skipped for control in of_rome.values())
    assert present(of_rome["identity"].moments).enabled is False
    assert (
        present(of_rome["wrong_block"].settings).blocks == (0,)
        and "block 0 in place of 4" in of_rome["wrong_block"].how
    )
    memit = present(found_for("memit")["wrong_block"].settings)
    assert memit.blocks == moved_blocks(get_method("memit").settings().resolved("atlas", 8).blocks, 8)


@pytest.mark.parametrize(
    ("method", "control", "why"),
    [
        ("grace", "random", "changes no weight"),
        ("ft", "identity", "uses no second moment"),
        ("alphaedit", "identity", "null space"),
        ("mend", "wrong_block", "name no block"),
        ("ike", "prompt_only", "in-context editing itself"),
    ],
)
def test_a_control_without_a_use_is_skipped_with_its_reason(method: str, control: str, why: str) -> None:
    assert why in found_for(method)[control].skipped


def test_a_run_without_c_and_a_model_of_one_block_have_fewer_controls() -> None:
    assert "moments.enabled=false" in found_for("r_rome", MomentSettings(enabled=False))["identity"].skipped
    assert "none apart" in found_for("memit", layers=1)["wrong_block"].skipped


# --- measured -------------------------------------------------------------------------------------------------


def test_each_control_is_the_edit_that_it_says(whole: tuple[Path, str], atlas_lm: LanguageModel) -> None:
    folder, _ = whole
    edits = {name: Edit.load(folder / "edits" / f"0-{name}.safetensors") for name in CONTROLS}
    edit, config = Edit.load(folder / "edits" / "0.safetensors"), configured()
    case = atlas_benchmark()[0]
    assert edits["random"].to_bytes() == random_like(edit, "0|0").to_bytes()
    settings = config.method
    assert settings.contexts == ContextSettings(counts=(1, 1))
    plain = r_rome(atlas_lm, case.fact, settings, moments=MomentSettings(tokens=2000, enabled=False), progress=False)
    assert edits["identity"].digest == plain.digest
    assert edits["wrong_block"].modules == {down_of(atlas_lm, 0)} and edit.modules == {down_of(atlas_lm, 4)}
    assert edits["prompt_only"].deltas == () and case.fact.target_new in str(edits["prompt_only"].installed[0])


def test_controls_are_measured_on_the_same_cases(whole: tuple[Path, str], atlas_lm: LanguageModel) -> None:
    """Each control's probabilities of the first case, by applying its file, or writing its text in front, here."""
    found, case = Run.at(whole[0]), atlas_benchmark()[0]
    rows = found.rows("control_cases.parquet")

    def first(rows: Sequence[dict[str, Any]], column: str) -> list[float]:
        return [row[column] for row in rows if row["case"] == case.id]

    for name in CONTROLS:
        mine = [row for row in rows if row["control"] == name]
        for column in ("case", "kind", "prompt", "nll_new_before"):
            assert [row[column] for row in mine] == [row[column] for row in found.cases]
        with Edit.load(whole[0] / "edits" / f"0-{name}.safetensors").applied(atlas_lm, check=False):
            expected = [score.new.nll for score in score_probes(atlas_lm, case.probes)]
        assert first(mine, "nll_new_after") == pytest.approx(expected, rel=1e-4, abs=1e-5)
    said = f"{case.fact.text} {case.fact.target_new}"
    asked = [replace(probe, prompt=f"New Fact: {said}\nPrompt: {probe.prompt}") for probe in case.probes]
    expected = [score.new.nll for score in score_probes(atlas_lm, asked)]
    assert first([r for r in rows if r["control"] == "prompt_only"], "nll_new_after") == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )


def test_the_record_holds_every_control_and_its_averages(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    found = record_of(folder)
    assert [each["name"] for each in found["controls"]] == list(CONTROLS)
    assert found["reversal"]["exact"] and found["edit"]["count"] == 2 and found["data"]["failed"] == []
    table = pandas.read_parquet(folder / "control_edits.parquet")
    norms = pandas.read_parquet(folder / "edits.parquet").norm.tolist()
    assert table[table.control == "random"].norm.tolist() == pytest.approx(norms, rel=1e-6)
    for each in found["controls"]:
        rows = table[table.control == each["name"]]
        assert each["count"] == 2 and each["failed"] == [] and each["norm"] == pytest.approx(rows.norm.mean())
        mine = [s for s in found["scores"] if s.get("control") == each["name"]]
        assert {s["when"] for s in mine} == {"after"}
        means = {s["metric"]: s["mean"] for s in mine}
        for metric in (ES, PS, NS):
            assert means[metric.name] == pytest.approx(rows[metric.column()].mean())
    assert score_of(found, ES.name)["mean"] == pandas.read_parquet(folder / "edits.parquet")[ES.column()].mean()


@pytest.mark.slow
def test_killed_among_controls_it_ends_with_the_same_bytes(whole: tuple[Path, str], tmp_path: Path) -> None:
    """As a kill leaves it among the controls of the second case; of its edits some files are kept, others lost."""
    lines = (whole[0] / "cases.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 5
    shutil.copytree(whole[0] / "edits", tmp_path / "edits")
    (tmp_path / "edits" / "1.safetensors").unlink()
    (tmp_path / "edits" / "1-wrong_block.safetensors").unlink()
    (tmp_path / "cases.jsonl").write_bytes(b"".join(lines[:8]))
    assert "7 results of a former run are kept" in run(tmp_path, "resume=true")
    for name in TABLES:
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name


def test_a_batch_has_one_edit_for_each_control_and_names_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of FT, which has no C, on a shard: what is drawn goes by the place of its first case in all of the data, which
    is 1. IKE's prefix may take half of the positions; here it may take almost none."""
    ike = get_method("ike").settings
    monkeypatch.setattr(ike, "__init__", with_room(ike.__init__, 0.01))
    asked = [text for text in ASKED if not text.startswith(("method.contexts", "task=", "data.limit"))]
    out = run(tmp_path, "task=batch", "method=ft", "data.limit=4", "data.shard=1/2", asked=asked)
    record, files = record_of(tmp_path), tmp_path / "edits"
    found = {each["name"]: each for each in record["controls"]}
    assert list(found) == list(CONTROLS) and "no second moment" in found["identity"]["skipped"]
    assert {name: each.get("count") for name, each in found.items() if name != "identity"} == {
        "random": 1,
        "wrong_block": 1,
        "prompt_only": 0,
    }
    drawn = random_like(Edit.load(files / "0.safetensors"), "0|1")
    assert Edit.load(files / "0-random.safetensors").to_bytes() == drawn.to_bytes()
    assert (files / "0-wrong_block.safetensors").is_file() and record["reversal"]["exact"]
    assert record["protocol"]["edits"] == "batch" and record["protocol"]["total"] == 2
    assert len(found["prompt_only"]["failed"]) == 2 and "method.room" in found["prompt_only"]["failed"][0]
    assert found["random"]["failed"] == [] and "failed on 2 cases" in out and record["data"]["failed"] == []
    assert score_of(record, ES.name)["n"] == 2 and "skipped, the method uses no second moment" in " ".join(out.split())
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "skipped: the method uses no second moment" in text


def with_room(begin: Callable[..., None], room: float) -> Callable[..., None]:
    return lambda self, **values: begin(self, **(values | {"room": room}))


# --- shown ----------------------------------------------------------------------------------------------------


def means(record: dict[str, Any], metric: str) -> list[str]:
    scores = [s for s in record["scores"] if s["metric"] == metric and s["when"] == "after"]
    return [f"{next(s for s in scores if s.get('control', '') == name)['mean']:.3f}" for name in ("", *CONTROLS)]


def rows_of_edits(folder: Path) -> dict[str, dict[Any, Any]]:
    """Rows by case of the edit ("") and of each control."""
    found = Run.at(folder)
    parts = {"": found.edits} | found.control_edits
    return {name: {row["case"]: row for row in part} for name, part in parts.items()}


def test_the_terminal_s_table(whole: tuple[Path, str]) -> None:
    folder, out = whole
    lines = out.splitlines()
    heads = next(i for i, line in enumerate(lines) if line.startswith("null controls"))
    assert all(label in lines[heads] for label in CONTROLS.values()) and max(map(len, lines)) <= 80
    rows = rows_of_edits(folder)
    for metric in (S, ES, PS, NS):
        place = next(i for i, line in enumerate(lines) if i > heads and line.split()[0] == metric.name)
        assert lines[place].split()[1:] == means(record_of(folder), metric.name)
        found = [present(paired(metric, rows[""], rows[name])).probability for name in CONTROLS]
        assert lines[place + 1].split()[-4:] == [f"{each:.3f}" for each in found]


def test_the_page_shows_means_and_paired_differences(whole: tuple[Path, str], tmp_path: Path) -> None:
    copied(whole[0], tmp_path / "run")
    text = report.write(tmp_path / "run").read_text(encoding="utf-8")
    rows = rows_of_edits(whole[0])
    assert "Null controls" in text and "the same method with the identity for C" in text
    for name in CONTROLS:
        assert str(present(paired(NS, rows[""], rows[name]))) in text


# --- several runs: protocols, pairs ---------------------------------------------------------------------------


def other_method(name: str) -> Callable[[dict[str, Any]], None]:
    return setting("config.method.name", name)


def worse(folder: Path) -> None:
    """Lower a metric of the first case in a run's table."""
    table = pandas.read_parquet(folder / "edits.parquet")
    table.loc[0, [PS.column(), NS.column()]] = 0.0
    table.to_parquet(folder / "edits.parquet")


def test_a_sweep_pairs_runs_on_the_same_cases(whole: tuple[Path, str], tmp_path: Path) -> None:
    copied(whole[0], tmp_path / "0")
    copied(whole[0], tmp_path / "1", other_method("memit"))
    copied(whole[0], tmp_path / "2", setting("data.digest", "of other data"))
    worse(tmp_path / "1")
    table = collect.collect(tmp_path)
    assert table.attrs["protocols"] == "" and not any("random" in name for name in table.attrs["brief"])
    assert "random.counterfact.ES_after" in table.columns
    found = collect.paired(tmp_path)
    assert set(zip(found["first"], found["second"], strict=True)) == {("0", "1")}
    first, second = (Run.at(tmp_path / name) for name in ("0", "1"))
    mine = found.set_index("metric").loc[PS.column()]
    keyed = [{row["case"]: row for row in each.edits} for each in (first, second)]
    expected = present(paired(PS, keyed[0], keyed[1]))
    assert (mine.difference, mine.p_first_better, mine.n) == (expected.difference.mean, expected.probability, 2)
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Paired differences" in text and str(expected) in text and "r_rome (0), random δ" in text


def table_after(text: str, marker: str) -> str:
    """The part of a page from a marker to the next group of figures."""
    begin = text.index(marker)
    return text[begin : text.find('class="strong"', begin + len(marker))]


def test_two_protocols_do_not_stand_in_one_column(whole: tuple[Path, str], tmp_path: Path) -> None:
    """The page names the difference above the tables, and splits them."""
    copied(whole[0], tmp_path / "a")
    copied(whole[0], tmp_path / "b", other_method("memit"))
    one = report.write(tmp_path).read_text(encoding="utf-8")
    assert "protocols, and their figures" not in one and one.count('<p class="caption">CounterFact') == 1
    batch = record_of(whole[0])["protocol"] | {"edits": "batch", "together": 3, "total": 3}

    def batched(record: dict[str, Any]) -> None:
        record["protocol"] = batch
        record["config"]["method"]["name"] = "emmet"

    copied(whole[0], tmp_path / "c", batched)
    copied(whole[0], tmp_path / "d", lambda record: record.pop("protocol"))
    text = report.write(tmp_path).read_text(encoding="utf-8")
    said = "These runs follow 3 protocols, and their figures cannot be compared with each other. They differ in: edits "
    assert said in text and "(single | batch | not stated)" in text
    assert text.index(said) < text.index('<p class="caption">CounterFact')
    assert text.count('<p class="caption">CounterFact') == 3
    alone = table_after(text, "edits: batch; cases in one edit: 3")
    assert "emmet" in alone and "r_rome" not in alone and "memit" not in alone
    assert "protocol not stated" in text
    assert collect.collect(tmp_path).attrs["protocols"].startswith("These runs follow 3 protocols")


def test_the_record_states_the_protocol(whole: tuple[Path, str], tmp_path: Path) -> None:
    found = record_of(whole[0])["protocol"]
    assert found == {
        "edits": "single",
        "together": 1,
        "total": 1,
        "measured": "after each edit, which is then taken back",
        "answers": "teacher-forced",
        "stop": "",
        "form": "",
        "judge": "",
    }
    assert "after each edit, which is then taken back" in report.write(whole[0]).read_text(encoding="utf-8")
