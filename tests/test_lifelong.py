"""task=lifelong: what is asked at each point, restored at the end, the same after a kill."""

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, REWRITE, SAME_SUBJECT, Case, Probe
from editkit.facts import Fact
from editkit.tasks.lifelong import sampled, staying
from tests.run_folders import score_of

FAST = ["method.steps=3", "method.contexts.counts=[1,1]", "moments.tokens=2000"]
SMALL = ["data.limit=6", "task.every=2", "task.retention=3", "task.untouched=2", "task.measure.generate=0"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "editkit.run", "task=lifelong", *FAST, *SMALL, *arguments]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("lifelong")
    done = run("hydra.run.dir=whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "whole", done.stdout


def points(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()[1:]]


def test_the_points(whole: tuple[Path, str]) -> None:
    folder, out = whole
    found = points(folder)
    assert [point["edits"] for point in found] == [0, 2, 4, 6]
    asked = [score_of(point, "counterfact.ES", asked="retention")["n"] for point in found[1:]]
    assert asked == [1, 2, 3] and not [s for s in found[0]["scores"] if s.get("asked") == "retention"]
    assert all(score_of(point, "counterfact.NS", asked="untouched")["n"] == 2 for point in found)
    first, kl = found[0], [score_of(point, "drift.KL")["mean"] for point in found]
    assert kl[0] == pytest.approx(0, abs=1e-9) and first["relative_norm"] == 0 and not first["collapsed"]
    assert kl[-1] > 0 and found[-1]["relative_norm"] > found[1]["relative_norm"] > 0
    record = json.loads((folder / "record.json").read_text())
    assert record["reversal"]["exact"] and record["series"] == found and record["scores"] == found[-1]["scores"]
    assert "all equal, bit" in out


def test_killed_and_resumed_it_measures_the_same(whole: tuple[Path, str], tmp_path: Path) -> None:
    process = subprocess.Popen(command("hydra.run.dir=run"), cwd=tmp_path, stdout=subprocess.PIPE)
    session = tmp_path / "run" / "session" / "session.json"
    deadline = time.monotonic() + 120
    while not session.exists() or len(json.loads(session.read_text())["steps"]) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run("hydra.run.dir=run", "resume=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "points.jsonl").read_bytes() == (whole[0] / "points.jsonl").read_bytes()


def test_it_may_stop_at_a_collapse(tmp_path: Path) -> None:
    wild = ["method.layer=0", "method.clamp=null", "method.lr=50", "method.weight_decay=0", "method.steps=10"]
    done = run("hydra.run.dir=run", "task.collapse=1.01", "task.stop_at_collapse=true", *wild, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = points(tmp_path / "run")
    assert found[-1]["collapsed"] and found[-1]["edits"] < 6 and "collapsed" in done.stdout


def test_shards_are_refused(tmp_path: Path) -> None:
    done = run("data.shard=0/2", cwd=tmp_path)
    assert done.returncode == 2 and "data.shard is 0/2" in done.stderr


@pytest.mark.parametrize(("edited", "retention"), [(6, 3), (500, 100), (5, 100), (7, 3), (1, 1)])
def test_the_sample_is_spread_over_all_cases(edited: int, retention: int) -> None:
    found = sampled(edited, retention)
    assert found[0] == 0 and len(found) == min(edited, retention) and found[-1] < edited
    gaps = [b - a for a, b in pairwise(found)]
    assert max(gaps, default=1) <= -(-edited // retention)


def test_an_untouched_case_asks_that_its_truth_stays() -> None:
    fact = Fact("{} is in", "Rome", "France", "Italy")
    probes = [Probe(REWRITE, fact.text, "Italy", "France"), Probe(PARAPHRASE, "Rome lies in", "Italy", "France")]
    probes += [Probe(SAME_SUBJECT, "Rome speaks", "Italian", "French"), Probe(REWRITE, "Unknown:", "", "France")]
    found = staying(Case((fact,), tuple(probes)))
    assert [(probe.kind, probe.prompt, probe.wanted) for probe in found.probes] == [
        (NEIGHBORHOOD, "Rome is in", "Italy"),
        (NEIGHBORHOOD, "Rome lies in", "Italy"),
    ]
