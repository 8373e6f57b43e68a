"""Every method on one stream of edits: what lasts after 100 to 10,000 of them, one, ten or a hundred at a time.

    python experiments/lasting/lasting.py run FOLDER                       # the bundled model; goes on where it stopped
    python experiments/lasting/lasting.py run FOLDER --model ORGANISM      # another model of the atlas
    python experiments/lasting/lasting.py results FOLDER                   # lasting.json, and the tables (lasted.py)

A cell is a method and a number of facts a step. Its run edits 1,000 facts of the atlas again and again with other
objects, 10,000 edits in all, and is measured at AT. It ends at the end of the stream; where it is broken (perplexity on
prose over 10 times the unedited model's, or fewer than half of 20 untouched facts answered rightly; looked at every
100 edits); or when its steps have taken `--minutes` of processor time. The norm of ΔW ends no run. A cell that was
stopped for its time goes on when there is more of it.

An organism is another model of the atlas, made by scripts/train_atlas.py; its folder must be called "atlas", so that
the methods take the bundled model's constants. Its blocks are those at the same place before and after the block from
which other tokens read the subject (`block_of`).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lasted

import editkit
from editkit.data import load_cases
from editkit.data.cases import Case
from editkit.data.kinds import NEIGHBORHOOD, PARAPHRASE, REWRITE, SAME_SUBJECT
from editkit.files import write_text
from editkit.methods import get_method
from editkit.methods.shared.anchor import pilot_anchor
from editkit.metrics.counterfact import ES, S
from editkit.metrics.measure import look, rows_of, scores_of_rows
from editkit.metrics.metric import AFTER, RETENTION, UNTOUCHED, Metric
from editkit.metrics.natural import GOES_ON, RIGHT
from editkit.metrics.summary import summary
from editkit.models.load import BUNDLED
from editkit.runs import names
from editkit.settings import DataSettings, LifelongSettings, MeasureSettings
from editkit.tasks.costs import read_costs

HERE = Path(__file__).parent
EDITS, FACTS = 10_000, 1_000
# What ends a stream: perplexity or untouched facts, and no norm. Nothing is asked in a distracting context.
ENDS = ("task.alarm.growth=null", "task.alarm.per_fact=null", "task.on_collapse=stop", "task.measure.distracted=false")
REFUSED = "refused.txt"  # what a run said that could not begin
AT = (100, 200, 500, 1000, 2000, 5000, 10_000)
BATCHES = (100, 10, 1)
# What is run, quick methods first: a method, after a comma the name of what is added, and its settings.
# Values are optimised by `descent`, which needs a quarter of Adam's time on this model (experiments/solver); the rows
# with "Adam" show what that changes. pmet has no descent.
DESCENT, ANCHOR = "method.solver=descent", "ANCHOR"  # `anchor` gives the number
METHODS: dict[str, tuple[str, ...]] = {
    "ultraedit": (),
    "stableedit": (),
    "mend": (),
    "memit": (DESCENT,),
    "memit_seq": (DESCENT,),
    "alphaedit": (DESCENT,),
    "ft_l": (),
    "ft_bf": (),
    "crispedit": (),
    "encore": (DESCENT,),
    "betaedit": (DESCENT,),
    "emmet": (DESCENT,),
    "alphaedit, NAS": (DESCENT, ANCHOR),
    "alphaedit, SPHERE": (DESCENT, "method.transform=sphere"),
    "memit, NAS": (DESCENT, ANCHOR),
    "memit_seq, SimIE": (DESCENT, "method.simie=1e4"),  # memit itself remembers no keys
    "ft": (),
    "grace": (),
    "pmet": (),
    "memit, Adam": (),
    "alphaedit, Adam": (),
    "rome": (DESCENT,),
    "r_rome": (DESCENT,),
    "lora": (),
    "anyedit": (DESCENT,),
    "kn": (),
    "ike": (),
}
INSTALLED = ("grace", "ike")  # what they put on the model cannot be folded into a sum of weights
PILOTS, PILOTS_ASKED = 100, 30  # facts that give an organism's anchor and learning rates, none of the stream's
# Methods that train weights, and what of the bundled model's learning rate is tried on another organism.
_SOME, _MANY = [4.0**k for k in range(-2, 3)], [4.0**k for k in range(-2, 7)]
RATES: dict[str, list[float]] = {
    **dict.fromkeys(("ft", "ft_l", "ft_bf", "crispedit"), _SOME),
    **dict.fromkeys(("ultraedit", "stableedit"), _MANY),
}


class Organism:
    """A model of the atlas. `name`: the bundled one, or a folder as scripts/train_atlas.py writes it."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, BUNDLED.get(name, Path(name))
        self.title = name if name in BUNDLED else self.folder.resolve().parent.name
        self.layers, self.extract = _shape(self.folder)

    def block(self, block: int) -> int:
        """The block that stands where `block` stands in the bundled model.

        Before the block from which other tokens read the subject it is counted back from there, after it it is at the
        same share of what follows.
        """
        layers, extract = _shape(BUNDLED["atlas"])
        if block < extract:
            return max(0, self.extract - (extract - block))
        return self.extract + round((block - extract) * (self.layers - 1 - self.extract) / (layers - 1 - extract))

    def blocks(self, method: str) -> dict[str, Any]:
        """The blocks that a method edits, by its setting for them; none where it takes its own."""
        constants = getattr(get_method(method).settings, "constants", None)
        found = constants.of("atlas", _shape(BUNDLED["atlas"])[0]) if constants else {}
        if self.name in BUNDLED:
            return {}
        if "layer" in found:
            return {"layer": self.block(found["layer"])}
        return {"layers": sorted({*map(self.block, found["layers"])})} if "layers" in found else {}


def _shape(folder: Path) -> tuple[int, int]:
    """Blocks, and the first in which other tokens read a subject."""
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    return recipe["n_layer"], recipe["extract_from"]


@dataclass(frozen=True)
class Cell:
    """One run: a method of METHODS with so many facts a step, in a folder of its own."""

    organism: Organism
    method: str
    batch: int
    folder: Path  # of the organism

    @property
    def path(self) -> Path:
        return self.folder / f"{self.method.replace(', ', '-').lower()}-{self.batch}"

    def command(self) -> list[str]:
        """The run, from its begin or from where it stopped."""
        name = self.method.split(",")[0]
        given = [f"method.anchor={anchor(self):.6g}" if text == ANCHOR else text for text in METHODS[self.method]]
        hundred = max(1, 100 // self.batch)  # steps
        keys = [
            "task=lifelong",
            f"method={name}",
            *given,
            *(f"method.{key}={value}" for key, value in self.organism.blocks(name).items()),
            *([f"method.lr={rate(self, name):.6g}"] if name in RATES and self.organism.name not in BUNDLED else []),
            f"model.name={self.organism.name}",
            f"data.stream={EDITS}",
            f"data.limit={FACTS}",
            f"task.step={self.batch}",
            "task.every=null",
            f"task.at=[{','.join(map(str, AT))}]",
            f"task.keep={'null' if name in INSTALLED else 1}",
            f"task.save={hundred}",
            f"task.alarm.every={hundred}",
            *ENDS,
            f"hydra.run.dir={self.path}",
        ]
        resume = ["resume=true"] if (self.path / names.POINT_LINES).exists() else []
        return [sys.executable, "-m", "editkit.run", *keys, *resume]

    @property
    def ended(self) -> bool:
        return (self.path / names.RECORD).exists() or (self.path / REFUSED).exists()

    @property
    def cpu(self) -> float:
        """Seconds of processor time that the steps have taken."""
        path = self.path / names.COSTS
        return sum(cost.cpu for cost in read_costs(path)) if path.exists() else 0.0

    def run(self, seconds: float, until: float) -> str:
        """Run until it ends, its steps have taken `seconds`, or it is `until` (time.time()). What came of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        begun = (self.path / names.POINT_LINES).exists()
        with (self.path / "said.txt").open("ab") as said:
            process = subprocess.Popen(self.command(), stdout=said, stderr=said)
            try:
                while process.poll() is None:
                    time.sleep(1)
                    if self.cpu >= seconds or time.time() >= until:
                        break
            finally:
                if process.poll() is None:
                    process.kill()  # a run that is killed goes on with the same bytes
                process.wait()
        if process.returncode > 0:
            told = (self.path / "said.txt").read_text(encoding="utf-8")[-2000:]
            if begun:  # other settings, say: its points are not those of a cell that ended
                raise SystemExit(told)
            write_text(self.path / REFUSED, told)
        return "ended" if self.ended else f"stopped after {self.cpu:.0f} s of steps"


def anchor(cell: Cell) -> float:
    """The anchor of a method's values on an organism, computed once: of pilot facts."""

    def found() -> float:
        lm = editkit.load(cell.organism.name)
        settings = editkit.MemitSettings(solver="descent", **cell.organism.blocks("memit"))
        return pilot_anchor(editkit.memit(lm, [case.fact for case in pilots()], settings))

    return _kept(cell.folder / "anchor.json", found)


def rate(cell: Cell, method: str) -> float:
    """The learning rate of a method that trains weights, on an organism for which the package has none.

    That of RATES × the bundled model's with the largest S of the first PILOTS_ASKED pilot facts, after all of them have
    been edited in one step.
    """

    def found() -> float:
        lm, cases = editkit.load(cell.organism.name), pilots()
        kind: Any = get_method(method).settings
        start: float = kind.constants.of("atlas", lm.layers)["lr"]
        asked = MeasureSettings(generate=0, natural=0, fluency=0, distracted=False)
        before = [look(lm, case, asked) for case in cases[:PILOTS_ASKED]]
        scores: dict[float, float] = {}
        for factor in RATES[method]:
            settings = kind(lr=factor * start, **cell.organism.blocks(method))
            edit = get_method(method)(lm, [case.fact for case in cases], settings, progress=False)
            with edit.applied(lm):
                rows = [rows_of(case, old, look(lm, case, asked)) for case, old in zip(cases, before, strict=False)]
            found = summary([scores_of_rows(each) for each in rows])
            best = next(score.average for score in found if (score.metric, score.when) == (S, AFTER))
            scores[factor * start] = best.mean if best else 0.0
        print(scores, flush=True)
        return max(scores, key=lambda lr: scores[lr])

    return _kept(cell.folder / f"rate-{method}.json", found)


def pilots() -> Sequence[Case]:
    """Facts that no stream has, neither edited nor untouched."""
    first = FACTS + LifelongSettings().untouched
    return load_cases(DataSettings(), seed=0, distinct=True).cases[first : first + PILOTS]


def _kept(path: Path, compute: Callable[[], float]) -> float:
    """A number that is computed once and kept in a file."""
    if not path.exists():
        write_text(path, json.dumps({"value": compute(), "pilots": PILOTS}) + "\n")
    value: float = json.loads(path.read_text(encoding="utf-8"))["value"]
    return value


def cells(folder: Path, organism: Organism, methods: list[str], batches: list[int]) -> Iterator[Cell]:
    """All cells, large steps first, quick methods first."""
    for batch in batches:
        for method in methods:
            yield Cell(organism, method, batch, folder / organism.title)


def run(folder: Path, chosen: argparse.Namespace) -> None:
    """Run what has not ended."""
    until = time.time() + 3600 * chosen.hours
    organism = Organism(chosen.model)
    for cell in cells(folder, organism, chosen.methods.split(";"), [int(b) for b in chosen.batches.split(",")]):
        if cell.ended or cell.cpu >= 60 * chosen.minutes or time.time() >= until:
            continue
        print(
            f"{time.strftime('%H:%M:%S')}  {organism.title}, {cell.method}, {cell.batch} a step", end="  ", flush=True
        )
        print(cell.run(60 * chosen.minutes, until), flush=True)


# ---- what the runs found


SHOWN: dict[str, tuple[str, Metric]] = {
    "written": (RETENTION, ES),
    "said freely": (RETENTION, RIGHT[REWRITE]),
    "paraphrase": (RETENTION, RIGHT[PARAPHRASE]),
    "same subject": (RETENTION, RIGHT[SAME_SUBJECT]),
    "goes on": (RETENTION, GOES_ON),
    "untouched": (UNTOUCHED, RIGHT[NEIGHBORHOOD]),
}


def found_in(cell: Cell) -> dict[str, Any] | None:
    """What a cell's files hold; None where it has not begun."""
    if not (cell.path / names.POINT_LINES).exists():
        return None
    lines = [json.loads(line) for line in (cell.path / names.POINT_LINES).read_text(encoding="utf-8").splitlines()]
    failed = [line for line in lines if "failed" in line]
    collapse = next((line for line in lines if "collapse" in line), None)
    costs = read_costs(cell.path / names.COSTS) if (cell.path / names.COSTS).exists() else []
    made = [cost.cpu for cost in costs]
    path = cell.path / names.RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    found: dict[str, Any] = {
        "model": cell.organism.title,
        "method": cell.method,
        "batch": cell.batch,
        "points": [point_of(line) for line in lines if "edits" in line],
        "edits": max(min(EDITS, len(costs) * cell.batch), *(line.get("edits", 0) for line in lines)),
        "broken": collapse and collapse["edits_kept"],
        "why": collapse and collapse["collapse"].split(": ", 1)[-1],
        "failed": sum(len(line["cases"]) for line in failed),
        "refused": _named(cell, failed[0]["failed"]) if failed else None,
        "ended": cell.ended,
        "cpu": sum(made) / (len(made) * cell.batch) if made else None,  # seconds an edit
        "bytes": _bytes(cell),
        "command": _plain(cell),
        "commit": record["environment"]["commit"] if record else None,
    }
    return found


def _plain(cell: Cell) -> list[str]:
    """The command without what belongs to this machine: folders, and where the organism lies."""
    kept = [text for text in cell.command()[1:] if not text.startswith(("resume=", "hydra.run.dir="))]
    return [_named(cell, text) for text in kept]


def _named(cell: Cell, text: str) -> str:
    """A text with the organism's folder as README.md has it."""
    name = cell.organism.name
    return text if name in BUNDLED else text.replace(name, f"training/{cell.organism.title}/atlas")


def point_of(line: dict[str, Any]) -> dict[str, Any]:
    """The figures of a point: mean, bounds and n of each of SHOWN."""
    point = {name: line["alarm"][name] for name in ("growth", "per_fact", "perplexity")} | {"edits": line["edits"]}
    for name, (asked, metric) in SHOWN.items():
        for score in line["scores"]:
            named = (score["metric"], score.get("part") or "", score["when"], score.get("asked") or "")
            if named == (metric.name, metric.part or "", AFTER, asked):
                point[name] = [score[key] for key in ("mean", "low", "high", "n")]
    return point


def _bytes(cell: Cell) -> float | None:
    """Bytes of the last step's file, a fact; what a session keeps of each step that can be undone."""
    path = cell.path / names.SESSION / "session.json"
    if not path.exists():
        return None
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
    return (path.parent / steps[-1]["file"]).stat().st_size / cell.batch if steps else None


def collect(folder: Path) -> list[dict[str, Any]]:
    """What all cells in `folder` hold, of every organism that has a folder there."""
    found = []
    for home in sorted(path for path in folder.iterdir() if path.is_dir()):
        organism = Organism(_model_of(home))
        found += [each for cell in cells(folder, organism, list(METHODS), list(BATCHES)) if (each := found_in(cell))]
    return found


def _model_of(home: Path) -> str:
    """The name of the model that the cells of a folder were run on."""
    points = next(home.glob(f"*/{names.POINT_LINES}"))
    with points.open(encoding="utf-8") as file:
        name: str = json.loads(file.readline())["config"]["model"]["name"]
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "results"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="atlas", help="atlas, or the folder of an organism")
    parser.add_argument("--methods", default=";".join(METHODS), help="names, with ';' between them")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="facts a step")
    parser.add_argument("--minutes", type=float, default=2.5, help="of processor time for a cell's steps")
    parser.add_argument("--hours", type=float, default=24, help="for all")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    if chosen.what == "run":
        run(folder, chosen)
        return
    write_text(HERE / "lasting.json", json.dumps(collect(folder), indent=1, ensure_ascii=False) + "\n")
    lasted.fill()


if __name__ == "__main__":
    main()
