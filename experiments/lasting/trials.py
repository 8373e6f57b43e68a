"""Why do some orderings hold and others not? One change of a method, on the stream over 1,000 facts, 100 a step.

    python experiments/lasting/trials.py run FOLDER                                # goes on where it stopped
    python experiments/lasting/trials.py run FOLDER --model training/wide/atlas    # the trials of another organism
    python experiments/lasting/trials.py results FOLDER                            # trials.json, README.md's table

Each changes one thing of a method that does not come up to another one here: one that a paper has above the other, or
the worse one of an ordering that holds. Said before they were run: a change explains it if the method, with it, lives
at least as long as the other one, and says at least half of the first 200 objects, or as many as the other.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from lasted import figure
from lasting import DESCENT, METHODS, Organism, point_of
from marked import between, table
from why import BATCH, STREAMS, end_of, ending, run_cell

from editkit.files import write_text
from editkit.runs import names

HERE = Path(__file__).parent
FACTS = "1000"  # the stream of why.py
JUDGED = 200  # edits after which answers are judged


@dataclass(frozen=True)
class Trial:
    """A method with one change, on the stream over 1,000 facts, against a method as it is."""

    method: str
    change: str
    other: str  # the method that it does not come up to without the change
    model: str = "atlas"  # an organism's title
    other_model: str = ""  # where it is another one

    @property
    def cell(self) -> str:
        return "-".join(re.findall(r"\w+", f"{self.method} {self.change.removeprefix('method.')}"))


TRIALS = (
    Trial("alphaedit", "method.keep_earlier=false", "memit"),
    Trial("alphaedit", "method.l2=10", "memit"),
    Trial("alphaedit", "method.fraction=0.5", "memit"),
    Trial("alphaedit", "method.l2=100", "memit"),  # added when 10 had explained it, as the next one:
    Trial("memit", "method.mom2_update_weight=100", "memit"),  # does a stronger hold help the other method too?
    Trial("memit_seq", "method.mom2_update_weight=100", "memit"),
    Trial("memit_seq", "method.simie=10", "memit_seq"),  # SimIE's own strength writes nothing here
    Trial("encore", "method.keep_earlier=false", "memit"),
    Trial("encore", "method.gamma=10", "memit"),  # the paper's for GPT-2 XL
    Trial("ft_bf", "method.lr=1e-3", "alphaedit"),
    Trial("ft_bf", "method.replay=0", "alphaedit"),
    Trial("ultraedit", "method.lr=0.002", "alphaedit", "wide"),  # the bundled model's
    Trial("ultraedit", "method.lr=0.000256", "alphaedit", "wide"),  # a quarter of what it has there
    # Orderings that hold: is it that a step is smaller? StableEdit's ΔW has .4 of the norm of UltraEdit's after 200
    # edits, and NAS keeps values short.
    Trial("ultraedit", "method.lr=0.0008", "stableedit"),
    Trial("memit", "method.clamp=0.5", "memit, NAS"),  # on the unedited model ‖δ‖ is half of ‖v0‖, so 1 holds nothing
    Trial("memit", "method.clamp=0.25", "memit, NAS"),
    # Where unrouted's own trace finds recall (task=trace data=atlas data.limit=30): block 0, then 1.
    Trial("memit", "method.layers=[0,1]", "memit", "unrouted", "atlas"),
    Trial("alphaedit", "method.layers=[0,1]", "alphaedit", "unrouted", "atlas"),
)


def run(folder: Path, organism: Organism) -> None:
    """Every trial of a model that has not ended."""
    for trial in TRIALS:
        if trial.model == organism.title:
            solver = [DESCENT] if DESCENT in METHODS[trial.method] else []
            blocks = [f"method.{key}={value}" for key, value in organism.blocks(trial.method).items()]
            kept = [text for text in blocks if text.split("=")[0] != trial.change.split("=")[0]]
            keys = [f"method={trial.method}", *solver, *kept, trial.change, f"model.name={organism.name}"]
            run_cell(folder / organism.title / trial.cell, [*keys, *STREAMS[FACTS]])


def found_in(path: Path) -> dict[str, Any] | None:
    """How a trial ended, and its scores after JUDGED edits; None where it has not ended."""
    end = end_of(path)
    if end is None:
        return None
    lines = (path / names.POINT_LINES).read_text(encoding="utf-8").splitlines()
    point = next((row for line in lines if (row := json.loads(line)).get("edits") == JUDGED), None)
    return end | ({"judged": point_of(point)} if point else {})


def tried(found: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[str]:
    """A row a trial, beside the method without the change and the other one. `plain`: the cells of lasting.json."""
    rows = []
    for trial in TRIALS:
        mine = next((r for r in found if (r["method"], r["model"], r["change"]) == _key(trial)), None)
        if mine is None:
            continue
        other_model = trial.other_model or trial.model
        unchanged, other = _cell(plain, trial.method, trial.model), _cell(plain, trial.other, other_model)
        point = mine.get("judged", {})
        said = point.get("said freely")
        explains = _lived(mine) >= _lived(other) and said is not None and said[0] >= min(0.5, _said(other))
        at_model = f" on {other_model}" if trial.other_model else ""
        rows.append(
            [
                f"{trial.method} on {trial.model}",
                f"`{trial.change}`",
                ending(unchanged),
                ending(mine),
                figure(said),
                figure(point.get("untouched")),
                f"{trial.other}{at_model}: {ending(other)}",
                "yes" if explains else "no",
            ]
        )
    head = ["method", "change", "broken at, without", "with", f"said freely, {JUDGED}", f"untouched, {JUDGED}"]
    return table([*head, "the other method", "explains it"], rows)


def _key(trial: Trial) -> tuple[str, str, str]:
    return trial.method, trial.model, trial.change


def _cell(plain: list[dict[str, Any]], method: str, model: str) -> dict[str, Any]:
    return next(c for c in plain if (c["method"], c["model"], c["batch"]) == (method, model, BATCH))


def _said(cell: dict[str, Any]) -> float:
    """The share of objects that a cell of lasting.json says freely after JUDGED edits; 1 where it has no such point."""
    share: float = next((point["said freely"][0] for point in cell["points"] if point["edits"] == JUDGED), 1.0)
    return share


def _lived(row: dict[str, Any]) -> float:
    """Edits until it broke; without end where it did not."""
    return float("inf") if row["broken"] is None else row["broken"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "results"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="atlas", help="atlas, or the folder of an organism")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    if chosen.what == "run":
        run(folder, Organism(chosen.model))
        return
    trials = ((trial, found_in(folder / trial.model / trial.cell)) for trial in TRIALS)
    found = [{"method": t.method, "model": t.model, "change": t.change, **end} for t, end in trials if end]
    write_text(HERE / "trials.json", json.dumps(found, indent=1) + "\n")
    plain = json.loads((HERE / "lasting.json").read_text(encoding="utf-8"))
    between(HERE / "README.md", "trials", tried(found, plain))


if __name__ == "__main__":
    main()
