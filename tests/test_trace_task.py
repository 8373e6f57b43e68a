"""task=trace: one fact, the average over a data set, resumed; the arrays are those of the functions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from editkit.facts import Fact
from editkit.models.load import LanguageModel
from editkit.settings import TraceSettings
from editkit.tracing import AverageTrace, Traced, trace
from editkit.tracing.average import TracedFact
from tests.run_folders import score_of

FAST = ["task.trace.samples=1", "task.trace.kinds=[state,mlp]"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # bytes are compared


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "editkit.run", "task=trace", *FAST, *arguments]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)


def finished(*arguments: str, cwd: Path) -> str:
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def average(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("trace")
    out = finished("data=atlas", "data.limit=4", "hydra.run.dir=run", cwd=folder)
    return folder / "run", out


def test_one_fact_is_traced_as_by_the_function(tmp_path: Path, atlas_lm: LanguageModel) -> None:
    out = finished("edit=gpt2_fact", "hydra.run.dir=run", cwd=tmp_path)
    assert "'Paris': P 0.9" in out and "all equal, bit" in out and out.splitlines()[-1] == "run"
    found = Traced.load(tmp_path / "run" / "trace")
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    wanted = trace(atlas_lm, fact, TraceSettings(samples=1, kinds=("state", "mlp")), progress=False)
    assert found.tokens == wanted.tokens and found.answer == wanted.answer
    for kind, table in wanted.probability.items():
        assert found.probability[kind].numpy() == pytest.approx(table.numpy(), abs=1e-5)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["trace"]["kind"] == "one" and score_of(record, "trace.total_effect")["mean"] == found.total_effect
    assert record["reversal"]["exact"] and not (tmp_path / "run" / "edit.safetensors").exists()


def test_a_data_set_is_averaged_and_blocks_are_proposed(average: tuple[Path, str]) -> None:
    folder, out = average
    found = AverageTrace.load(folder / "average")
    record = json.loads((folder / "record.json").read_text())
    assert len(found.texts) + len(found.skipped) == 4 and len(record["data"]["failed"]) == len(found.skipped)
    proposal = record["trace"]["proposal"]
    assert proposal["text"].startswith(f"Edit block {proposal['layers'][0]}: ")
    assert proposal["text"] in " ".join(out.split())
    assert proposal["effect"] == found.mean("mlp")[2, proposal["layers"][0]].item()


@pytest.mark.slow
def test_a_trace_that_was_killed_ends_with_the_same_bytes(average: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = average
    half = tmp_path / "half"
    half.mkdir()
    lines = (folder / "facts.jsonl").read_bytes().splitlines(keepends=True)
    (half / "facts.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed while the third was written
    arguments = ["data=atlas", "data.limit=4", "hydra.run.dir=half"]
    assert "resume=true" in run(*arguments, cwd=tmp_path).stderr
    finished(*arguments, "resume=true", cwd=tmp_path)
    for name in ("facts.jsonl", "average.npz", "average.json", "average.parquet"):
        assert (half / name).read_bytes() == (folder / name).read_bytes(), name


def test_other_settings_do_not_go_on(average: tuple[Path, str]) -> None:
    folder, _ = average
    arguments = ["data=atlas", "data.limit=4", "hydra.run.dir=run", "resume=true", "task.trace.noise=2"]
    done = run(*arguments, cwd=folder.parent)
    assert done.returncode == 2 and "trace.noise=3.0, and now it is 2.0" in done.stderr


def test_no_fact_that_is_known_is_one_line(tmp_path: Path) -> None:
    rows = [{"prompt": "Rome is in", "subject": "Rome", "attribute": "Sweden", "known_id": 0}]
    (tmp_path / "mine.json").write_text(
        json.dumps([*rows, rows[0] | {"prompt": "Oslo is in", "subject": "Oslo", "attribute": "Peru", "known_id": 1}])
    )
    done = run("data=known", "data.path=mine.json", cwd=tmp_path)
    assert done.returncode == 1 and "None of 2 facts could be traced: the model does not know it" in done.stderr


def test_a_traced_fact_as_json_is_the_same() -> None:
    effect = torch.tensor([[0.1, 1 / 3], [float("nan")] * 2, [-0.0, 1e-300]], dtype=torch.float64)
    one = TracedFact("a", "", 0.1 + 0.2, 1e-9, 2, {"mlp": effect})
    again = TracedFact.from_json(json.loads(json.dumps(one.to_json())))
    assert (again.text, again.clean, again.corrupted, again.window) == ("a", 0.1 + 0.2, 1e-9, 2)
    assert torch.equal(again.effect["mlp"].nan_to_num(9), effect.nan_to_num(9))
    skipped = TracedFact("b", "why")
    assert TracedFact.from_json(skipped.to_json()).skipped == "why" and skipped.to_json() == {
        "text": "b",
        "skipped": "why",
    }
