"""The tables of this study, from its runs' folders.

python experiments/judged/make.py RUNS     # a folder of runs, one a method; writes results.json
python experiments/judged/make.py          # README.md's tables again, from results.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between, table

from editkit.data.kinds import NEGATION, NEIGHBORHOOD, PARAPHRASE, REVERSED, REWRITE, SAME_SUBJECT
from editkit.files import write_text
from editkit.metrics.counterfact import ES, NS, PS
from editkit.metrics.generation import ANSWERED
from editkit.metrics.metric import Average, Metric
from editkit.metrics.natural import GOES_ON, RIGHT
from editkit.metrics.probes import OF_TEMPLATES
from editkit.runs.pairs import differences
from editkit.runs.read import Run

HERE = Path(__file__).parent
METHODS = ("r_rome", "rome", "memit", "emmet", "alphaedit", "ft_l", "mend", "ultraedit")
COLUMNS: dict[str, Metric] = {
    "ES": ES,
    "PS": PS,
    "NS": NS,
    "prefix": ANSWERED[REWRITE],
    "natural stop": RIGHT[REWRITE],
    "natural, paraphrase": RIGHT[PARAPHRASE],
    "goes on": GOES_ON,
    "natural, neighborhood": RIGHT[NEIGHBORHOOD],
    "natural, same subject": RIGHT[SAME_SUBJECT],
    "negation": OF_TEMPLATES[NEGATION],
    "reversed": OF_TEMPLATES[REVERSED],
}
UNDER = ("ES", "NS", "natural stop", "natural, same subject")  # shown under the null controls
PAIRED = ("natural stop", "natural, paraphrase", "natural, neighborhood", "natural, same subject")


def results(folder: Path) -> dict[str, Any]:
    """The figures of every method, under its controls too, and each one's paired differences to the first."""
    runs = {name: Run.at(folder / name) for name in METHODS}
    found: dict[str, Any] = {"methods": {}}
    for name, run in runs.items():
        sides = run.sides()
        mine: dict[str, Any] = {"before": {}, "edit": {}, "controls": {}, "paired": {}}
        for column, metric in COLUMNS.items():
            mine["before"][column] = _kept(sides[metric].before)
            mine["edit"][column] = _kept(sides[metric].after)
        for control in run.record["controls"]:
            if "skipped" in control:
                mine["controls"][control["name"]] = {"skipped": control["skipped"]}
                continue
            under = run.sides(control=control["name"])
            mine["controls"][control["name"]] = {
                c: _kept(under[COLUMNS[c]].after) for c in UNDER if COLUMNS[c] in under
            }
        values = differences([COLUMNS[c] for c in PAIRED], runs[METHODS[0]].edits, run.edits)
        named = {metric: column for column, metric in COLUMNS.items()}
        mine["paired"] = {
            named[metric]: [each.difference.mean, each.difference.low, each.difference.high, each.probability]
            for metric, each in values.items()
        }
        command = [text for text in run.record["environment"]["command"][1:] if not text.startswith("hydra.run.dir=")]
        mine |= {"commit": run.record["environment"]["commit"], "command": command}
        mine |= {"protocol": run.record["protocol"], "exact": run.record["reversal"]["exact"]}
        found["methods"][name] = mine
    return found


def _kept(value: Average | None) -> list[Any] | None:
    return None if value is None else [value.mean, value.low, value.high, value.n]


def figure(value: list[Any] | None) -> str:
    """A mean with half of its interval."""
    if value is None:
        return "–"
    mean, low, high, _ = value
    return f"{mean:.3f}" + ("" if low is None else f" ±{(high - low) / 2:.2f}")


def beside(value: list[float] | None) -> str:
    """A paired difference with its interval, and the probability that the first is better."""
    return "–" if value is None else "{:+.3f} [{:+.3f}, {:+.3f}], P {:.3f}".format(*value)


def tables(found: dict[str, Any]) -> dict[str, list[str]]:
    """By the name of their marks in README.md."""
    methods = found["methods"]
    first = methods[METHODS[0]]
    rows = [["*unedited*", *(figure(first["before"][column]) for column in COLUMNS)]]
    rows += [[name, *(figure(each["edit"][column]) for column in COLUMNS)] for name, each in methods.items()]
    controls, reasons = [], {}
    for name, each in methods.items():
        for control, values in each["controls"].items():
            if "skipped" in values:
                reasons[f"{name}, {control}"] = values["skipped"]
            else:
                controls.append([name, control, *(figure(values.get(column)) for column in UNDER)])
    skipped = ["", *(f"Skipped: {what}: {why}." for what, why in reasons.items())] if reasons else []
    paired = [
        [
            name,
            *(
                f"{d:+.3f} [{low:+.3f}, {high:+.3f}], P {p:.3f}"
                for d, low, high, p in (each["paired"][c] for c in PAIRED)
            ),
        ]
        for name, each in methods.items()
        if name != METHODS[0]
    ]
    return {
        "scores": table(["", *COLUMNS], rows),
        "controls": table(["method", "in place of the edit", *UNDER], controls) + skipped,
        "paired": table([f"{METHODS[0]} minus", *PAIRED], paired),
    }


def fill(found: dict[str, Any]) -> None:
    """Put the tables between their marks in README.md."""
    for name, lines in tables(found).items():
        between(HERE / "README.md", name, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="folder with a run of each method")
    chosen = parser.parse_args()
    path = HERE / "results.json"
    if chosen.runs:
        write_text(path, json.dumps(results(chosen.runs), indent=1, ensure_ascii=False) + "\n")
    fill(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
