"""The page of a trace: every value of the arrays, the proposal, safe whatever the tokens, and damage is named."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from editkit import propose_layers, report
from editkit.errors import RecordError
from editkit.numbers import number
from editkit.tracing import PARTS, AverageTrace, Traced
from tests.pages import Parsed, page
from tests.present import present
from tests.run_folders import copied, score_of, setting

TOKENS = ["The", " <b>Eiffel</b>", " $Tower", "\n", " is"]


class Written(Protocol):
    """A copy of a trace's real run, with the arrays of `found` in place of its own. Returns its folder."""

    def __call__(self, folder: Path, found: Traced | AverageTrace, name: str, **trace: Any) -> Path: ...


@pytest.fixture
def written(real_runs: dict[str, Path]) -> Written:
    def write(folder: Path, found: Traced | AverageTrace, name: str, **trace: Any) -> Path:
        copied(real_runs[name], folder, setting("trace", trace))
        found.save(folder / name)
        return folder

    return write


def traced(kinds: Sequence[str] = ("state", "mlp")) -> Traced:
    draw = torch.Generator().manual_seed(0)
    tables = {kind: 0.1 + 0.8 * torch.rand(5, 3, generator=draw, dtype=torch.float64) for kind in kinds}
    how = {"prompt": "{} is", "subject": "The <b>Eiffel</b> $Tower\n"}
    return Traced(TOKENS, (1, 2), " Pa<i>ris", 0.95, 0.1, 2, tables, ("Big Ben",), how)


def averaged() -> AverageTrace:
    draw = torch.Generator().manual_seed(0)
    tables = {k: torch.rand(9, len(PARTS), 4, generator=draw, dtype=torch.float64) for k in ("state", "mlp")}
    for table in tables.values():
        table[:, 1] = torch.nan
        table[::2, 4] = torch.nan
    clean = torch.full((9,), 0.9, dtype=torch.float64)
    skipped = (("a fact", "the model does not know it"),)
    return AverageTrace(tuple(f"fact {i}" for i in range(9)), clean, clean - 0.7, tables, 2, skipped)


def cells(text: str) -> dict[tuple[str, str], tuple[str, str | None]]:
    """{(map, "row, column"): value} of every cell with its colour, from the titles in the drawings."""
    found = {}
    for figure in re.findall(r"<figure>(.*?)</figure>", text, re.S):
        title = present(re.search(r"<figcaption>(.*?)</figcaption>", figure)).group(1)
        drawing = ET.fromstring(present(re.search(r"<svg.*?</svg>", figure, re.S)).group(0))
        for box in drawing.iter("{http://www.w3.org/2000/svg}rect"):
            tip = box.find("{http://www.w3.org/2000/svg}title")
            if tip is not None:
                place, _, value = present(tip.text).rpartition(": ")
                found[title, place] = (value, box.get("fill"))
    return found


def test_every_cell_of_a_prompt_s_maps_says_its_probability(written: Written, tmp_path: Path) -> None:
    one = traced()
    text = report.write(written(tmp_path / "run", one, "trace", kind="one")).read_text(encoding="utf-8")
    found = cells(text)
    assert len(found) == 2 * 5 * 3
    for kind, title in (("state", "state"), ("mlp", "MLP outputs, window of 2")):
        for t, token in enumerate(["The", "<b>Eiffel</b>", "$Tower", "↵", "is"]):
            for block in range(3):
                value, _ = found[title, f"{token}, block {block}"]
                assert value == number(one.probability[kind][t, block].item())
    most = max(float(table.max()) for table in one.probability.values())
    yellow = {value for value, colour in found.values() if colour == "#fee838"}
    assert yellow == {number(most)}  # both maps have one scale
    shown = Parsed(text)
    assert not shown.problems and not {"b", "script", "i"} & {tag for tag, _ in shown.tags}
    assert "$Tower*" in shown.text and "The*" not in shown.text
    assert "In the subject's place: Big Ben." in shown.text and "0.95" in shown.text
    rows = [row for row in shown.rows if len(row) == 6 and row[0].startswith("MLP")]
    assert len(rows) == 15 and rows[0][4].strip() == number(one.probability["mlp"][0, 0].item())


def test_rows_are_reached_by_the_keyboard_and_say_their_most(written: Written, tmp_path: Path) -> None:
    one = traced(("state",))
    shown = page(written(tmp_path / "run", one, "trace", kind="one"))
    stops = [a["aria-label"] for tag, a in shown.tags if tag == "g" and a.get("tabindex") == "0"]
    block = int(one.probability["state"][2].argmax())
    assert (
        len(stops) == 5
        and stops[2] == f"$Tower*: most {number(one.probability['state'][2].max().item(), 3)}, block {block}"
    )
    assert [a["role"] for tag, a in shown.tags if tag == "svg"] == ["group"]


def test_an_average_s_page_has_its_proposal_means_and_bounds(written: Written, tmp_path: Path) -> None:
    average = averaged()
    proposal = propose_layers(average)
    told = asdict(proposal) | {"text": str(proposal)}
    folder = written(tmp_path / "run", average, "average", kind="average", proposal=told)
    text = report.write(folder).read_text(encoding="utf-8")
    shown = Parsed(text)
    assert not shown.problems and str(proposal) in shown.text
    assert "a fact" in shown.text and "the model does not know it" in shown.text
    found = cells(text)
    frame = average.to_frame().to_dict("records")
    assert len(found) == 2 * 5 * 4  # a kind of token that no fact has is left blank
    rows = [[" ".join(c.split()) for c in row] for row in shown.rows if len(row) == 7]
    rows = [row for row in rows if row[0] != "put back"]
    assert len(rows) == len(frame) == 48
    for row, wanted in zip(rows, frame, strict=True):
        assert (row[1], row[2], row[6]) == (wanted["part"], str(wanted["block"]), str(wanted["facts"]))
        bounds = [None if math.isnan(v) else v for v in (wanted["effect"], wanted["low"], wanted["high"])]
        assert row[3:6] == [number(v) for v in bounds]
    curves = [a["aria-label"] for tag, a in shown.tags if tag == "svg" and a["role"] == "img"]
    assert len(curves) == 2 and "last subject token (n = 9)" in curves[0]
    assert sum(a.get("class", "").endswith("band") for tag, a in shown.tags if tag == "path") == 4


def test_an_average_without_a_proposal(written: Written, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", averaged(), "average", kind="average", proposal=None)
    shown = page(folder)
    assert "Blocks to edit" not in shown.text and "Over blocks" in shown.text


def test_the_page_needs_no_torch_and_stands_beside_others(written: Written, tmp_path: Path) -> None:
    written(tmp_path / "x" / "a", traced(), "trace", kind="one")
    written(tmp_path / "x" / "b", averaged(), "average", kind="average", proposal=None)
    code = "import sys; sys.modules.update(torch=None, pandas=None, transformers=None, matplotlib=None)\n"
    code += "from editkit.report.__main__ import main; sys.exit(main(['x/a']) or main(['x/b']) or main(['x']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("x/report.html\n"), done.stderr


@pytest.mark.parametrize("name", ["trace.npz", "trace.json"])
@pytest.mark.parametrize("damage", ["gone", "half", "foreign"])
def test_damaged_arrays_are_named(written: Written, tmp_path: Path, name: str, damage: str) -> None:
    folder = written(tmp_path / "run", traced(), "trace", kind="one")
    path = folder / name
    if damage == "gone":
        path.unlink()
    elif damage == "half":
        path.write_bytes(path.read_bytes()[:90])
    elif name.endswith("json"):
        said = json.loads(path.read_text(encoding="utf-8"))
        said["along"]["token"] = ["one"]
        path.write_text(json.dumps(said), encoding="utf-8")
    else:
        averaged().save(folder / "other")
        (folder / "other.npz").replace(path)
    with pytest.raises(RecordError, match=re.escape(str(folder / "trace.npz"))):
        report.write(folder)
    assert not (folder / "report.html").exists()


def test_a_real_run_s_page_shows_what_the_tracer_wrote(real_runs: dict[str, Path], tmp_path: Path) -> None:
    one = copied(real_runs["trace"], tmp_path / "one")
    found = Traced.load(tmp_path / "one" / "trace")
    shown = page(tmp_path / "one")
    assert not shown.problems and number(found.total_effect, 3) in shown.text and "Paris" in shown.text
    assert score_of(one, "trace.total_effect")["mean"] == found.total_effect
    copied(real_runs["average"], tmp_path / "many")
    traced_facts = len(AverageTrace.load(tmp_path / "many" / "average").texts)
    assert f"facts {traced_facts}" in page(tmp_path / "many").text and not page(tmp_path).problems
