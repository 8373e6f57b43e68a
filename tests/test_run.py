"""The command as a user runs it: its output, its folder, its errors, a sweep, a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import yaml

from editkit import Edit, load
from editkit.methods import names as method_names
from tests.present import present
from tests.run_folders import score_of

FAST = ["method.steps=3", "method.contexts.counts=[1,1]", "moments.tokens=2000"]


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "editkit.run", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One default run from an empty folder: the folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("run")
    done = run("edit=gpt2_fact", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_output_is_readable_at_80_columns(finished: tuple[Path, str]) -> None:
    _, out = finished
    assert max(map(len, out.splitlines()[:-1])) <= 80
    for expected in ("The Eiffel Tower", "Paris → Rome", "paraphrases", "neighborhood", "continuation", "rank 1"):
        assert expected in out
    assert re.search(r"restored: 100 parameters and buffers, [\d,]+ bytes compared, all equal, bit\s+for bit", out)


def test_the_run_folder_is_named_on_the_last_line_and_complete(finished: tuple[Path, str]) -> None:
    folder, out = finished
    found = folder / out.splitlines()[-1]
    assert {p.name for p in found.iterdir()} == {
        "record.json",
        "config.yaml",
        "edit.safetensors",
        "cases.parquet",
        "report.html",
    }
    record = json.loads((found / "record.json").read_text())
    es = [score_of(record, "counterfact.ES", when)["mean"] for when in ("before", "after")]
    assert record["reversal"]["exact"] and es == [0.0, 1.0]
    assert record["environment"]["packages"]["torch"] and record["timings"]["total"] > 0
    assert record["verdict"]["landed"] and record["verdict"]["summary"] in finished[1]
    steps = record["edit"]["provenance"]["reports"][0]["steps"]
    assert {"loss", "nll", "kl", "weight_decay"} <= set(steps[0])
    config = yaml.safe_load((found / "config.yaml").read_text())
    assert config["method"]["name"] == "r_rome" and config["seed"] == 0
    cases = pandas.read_parquet(found / "cases.parquet")
    assert set(cases.kind) == {"rewrite", "paraphrase", "neighborhood", "distracted", "portability"}
    assert (cases.probability_new_after[cases.kind == "rewrite"] > 0.5).all()


def test_the_saved_edit_applies_to_a_fresh_model(finished: tuple[Path, str]) -> None:
    folder, out = finished
    edit = Edit.load(folder / out.splitlines()[-1] / "edit.safetensors")
    lm = load("atlas", device="cpu")
    with edit.applied(lm) as applied:
        pass
    assert present(applied.reversal).exact


def test_a_second_run_gives_the_same_edit_and_another_seed_does_not(finished: tuple[Path, str], tmp_path: Path) -> None:
    def edit(seed: int) -> bytes:
        done = run(f"seed={seed}", f"hydra.run.dir={tmp_path}/{seed}{time.time_ns()}", *FAST, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return (tmp_path / done.stdout.splitlines()[-1] / "edit.safetensors").read_bytes()

    assert edit(0) == edit(0) != edit(1)


def test_any_other_fact(tmp_path: Path) -> None:
    done = run(
        "edit.subject=Big Ben", 'edit.prompt="{} is located in the country of"', "edit.target_new=Japan", *FAST,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Big Ben is located in the country of … ? → Japan" in done.stdout


def test_a_sweep_leaves_one_table(tmp_path: Path) -> None:
    done = run("-m", "method.layer=3,4", "seed=0,1", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.splitlines()[-1]
    table = pandas.read_csv(path)
    assert len(table) == 4 and {"method.layer", "seed", "counterfact.ES_after", "reversal_exact"} <= set(table.columns)
    assert table.reversal_exact.all() and sorted(table["method.layer"].unique()) == [3, 4]
    page = tmp_path / done.stdout.splitlines()[-2]
    assert page.name == "report.html" and "4 runs compared" in page.read_text(encoding="utf-8")


def test_a_failing_job_does_not_stop_a_sweep(tmp_path: Path) -> None:
    done = run("-m", "method.layer=77,4", *FAST, cwd=tmp_path)
    assert done.returncode == 1
    assert "job 0 failed: Layer 77 was asked for; atlas has 8 blocks" in done.stderr
    assert len(pandas.read_csv(tmp_path / done.stdout.splitlines()[-1])) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["model=no-such-model"], 1, "No model 'no-such-model'"),
        (["method=rmoe"], 2, "did you mean 'rome'"),
        (["edit=gpt3_fact"], 2, "did you mean 'gpt2_fact'"),
        (["methd.layer=3"], 2, "No key 'methd.layer'"),
        (["edit.prompt='The tower is in'"], 1, "is not in the prompt 'The tower is in'"),
        (["edit.target_new="], 1, "target_new is empty"),
        (["edit.target_new=Paris"], 1, "nothing to change"),
        (["method.layer=8"], 1, "Layer 8 was asked for; atlas has 8 blocks. Set method.layer to a number from 0 to 7"),
        (["device=cuda:99"], 1, "cuda"),
        (["moments.source=/no/such/text"], 2, "neither 'atlas', nor a text file"),
        (["hydra.run.dir=/dev/null/run"], 1, "The run folder '/dev/null/run' cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = run(*arguments, cwd=tmp_path, env=environment)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("record.json"))


def test_a_traceback_on_request(tmp_path: Path) -> None:
    done = run("method=rmoe", cwd=tmp_path, env={**os.environ, "EDITKIT_TRACEBACK": "1"})
    assert done.returncode == 2 and "Traceback" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_leaves_no_half_file_and_the_next_run_works(how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "editkit.run", f"hydra.run.dir={tmp_path}/killed", *FAST]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    present(process.stdout).readline()  # the fact is printed: the model is loaded, the edit begins
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in err
    assert not (tmp_path / "killed" / "record.json").exists()
    for path in Path(tmp_path / "killed").glob("*.safetensors"):
        Edit.load(path)
    done = run(f"hydra.run.dir={tmp_path}/killed", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed" / "record.json").exists()


def test_help_names_the_groups(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for expected in (
        "edit=gpt2_fact",
        "method: " + ", ".join(method_names()),
        "moments",
    ):
        assert expected in done.stdout
