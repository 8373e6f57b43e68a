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

from editkit.config import _composed as composed
from editkit.config import to_config
from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, REWRITE, SAME_SUBJECT, Case, Probe
from editkit.errors import ConfigError
from editkit.facts import Fact
from editkit.folded import FOLD_FILE
from editkit.runs import names
from editkit.settings import LifelongSettings
from editkit.tasks import get_task
from editkit.tasks.costs import read_costs
from editkit.tasks.lifelong import sampled, staying
from editkit.tensorfiles import read_header
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
    done = run("hydra.run.dir=run", "task.alarm.perplexity=1.01", "task.on_collapse=stop", *wild, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = points(tmp_path / "run")
    assert found[-1]["collapsed"] and found[-1]["edits"] < 6 and "collapsed" in done.stdout


STREAM = ["method=ft_l", "data.stream=14", "data.limit=5", "task.keep=2", "task.save=3", "task.every=7"]
STREAM += ["task.retention=3", "task.untouched=1", "task.measure.generate=0", "task.measure.distracted=false"]
STREAM += ["task.alarm.tokens=128", "method.steps=2"]


def streamed(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    asked = [sys.executable, "-m", "editkit.run", "task=lifelong", *STREAM, *arguments]
    return subprocess.Popen(asked, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kept_of(folder: Path) -> dict[str, bytes]:
    """The files that must not depend on kills."""
    return {path.name: path.read_bytes() for path in (*(folder / "session").iterdir(), folder / "points.jsonl")}


@pytest.mark.slow
def test_a_stream_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = streamed("hydra.run.dir=whole", cwd=tmp_path)
    assert whole.wait() == 0, whole.communicate()
    for step in (4, 9):  # neither is saved: the last saves are of 3 and 9 steps
        process = streamed("hydra.run.dir=run", *(["resume=true"] if step > 4 else []), cwd=tmp_path)
        costs = tmp_path / "run" / "costs.jsonl"
        deadline = time.monotonic() + 240
        while not costs.exists() or f'"step": {step}' not in costs.read_text(encoding="ascii"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = streamed("hydra.run.dir=run", "resume=true", cwd=tmp_path)
    assert done.wait() == 0, done.communicate()
    found = kept_of(tmp_path / "run")
    assert found == kept_of(tmp_path / "whole") and len(found) == 5  # points, session.json, the fold, two steps
    assert [point["edits"] for point in points(tmp_path / "run")] == [0, 7, 14]
    found_costs = read_costs(tmp_path / "run" / "costs.jsonl")
    assert [cost.step for cost in found_costs] == list(range(14))
    assert all(cost.cpu > 0 and cost.rss >= cost.anonymous > 0 for cost in found_costs)


def test_a_rollback_names_what_was_dropped(tmp_path: Path) -> None:
    """A limit that a wild step passes; the record and the session are those of the last good step."""
    limits = ["task.alarm.every=2", "task.alarm.growth=0.06", "task.on_collapse=rollback", "task.every=14"]
    done = streamed("hydra.run.dir=run", *limits, cwd=tmp_path)
    out, error = done.communicate(timeout=300)
    assert done.returncode == 0, error.decode()
    lines = [json.loads(line) for line in (tmp_path / "run" / "points.jsonl").read_text().splitlines()[1:]]
    (ended,) = [line for line in lines if "collapse" in line]
    good = ended["edits_kept"]
    assert 0 < good < 12 and good % 2 == 0 and len(ended["dropped"]) == 2
    said = " ".join(out.decode().split())
    assert f"alarm after step {good + 2} ({good + 2} facts edited): ‖ΔW‖/‖W‖ is" in said
    assert f"It is back at step {good}, the last good one; dropped: " in said
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["edit"]["count"] == good and record["data"]["collapse"] == ended and record["reversal"]["exact"]
    assert not record["series"][-1]["collapsed"]
    session = json.loads((tmp_path / "run" / "session" / "session.json").read_text())
    fold = read_header(tmp_path / "run" / "session" / session["folded"]["file"], FOLD_FILE)
    assert fold["steps"] + len(session["steps"]) == good
    alone = streamed("hydra.run.dir=alone", f"data.stream={good}", "task.every=14", "task.save=100", cwd=tmp_path)
    assert alone.wait() == 0, alone.communicate()
    ours, theirs = (kept_of(tmp_path / name) for name in ("run", "alone"))
    assert ours.pop("points.jsonl") != theirs.pop("points.jsonl") and ours == theirs


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "grace", "method.steps": "1", "task.keep": "1"}, "cannot be folded into a sum of weights"),
        ({"method": "memit", "method.simie": "1", "method.steps": "1"}, "method.simie needs the keys of each step"),
    ],
)
def test_a_setting_that_no_step_can_be_made_with_ends_it(asked: dict[str, str], said: str, tmp_path: Path) -> None:
    few = {"data.limit": "1", "task.measure.generate": "1", "task.untouched": "1", "moments.tokens": "2000"}
    with pytest.raises(ConfigError, match=said):
        get_task("lifelong").load()(to_config(composed({"task": "lifelong"} | few | asked)), tmp_path, lambda _: None)
    assert not [line for line in (tmp_path / names.POINT_LINES).read_text().splitlines() if "failed" in line]


def test_it_may_be_measured_at_chosen_places() -> None:
    assert LifelongSettings(every=None, at=(5, 1, 50)).points(14) == {0, 1, 5, 14}
    assert LifelongSettings(every=4, at=(5,)).points(9) == {0, 4, 5, 8, 9}


def test_a_place_inside_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.at must be a multiple of task\.step; found 25"):
        LifelongSettings(step=10, every=None, at=(20, 25))


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
