"""Why do the methods with values break where they do, and why do some published orderings not hold?

    python experiments/lasting/why.py run FOLDER                            # other streams, and other settings
    python experiments/lasting/why.py run FOLDER --model training/wide/atlas     # the trials of another organism
    python experiments/lasting/why.py results FOLDER                        # why.json, and README.md's tables

**Streams.** If it is the number of edits, or the norm that they add, a stream over 100 facts breaks where one over
1,000 does. If it is the number of different keys that W must hold, it lives longer.

The facts of the atlas share subjects, and facts of one subject have nearly one key. AlphaEdit and MEMIT-Seq hold the
keys of earlier steps where they are, so a later step that must move such a key works against them. One stream has one
fact a subject, each edited once. If that is the reason why they break before MEMIT, they don't on this stream.

If it is the dimension of a key that bounds a stream, it lives longer where keys have more of it: on the bundled model
with 3,072 neurons a block in place of 768 (scripts/widened.py), of which the added ones write nothing before an edit.
Said before it was run: at least twice as long counts as yes.

**Trials.** Each changes one thing of a method that does not come up to another one here: one that a paper has above the
other, or the worse one of an ordering that holds. Said before they were run: a change explains it if the method, with
it, lives at least as long as the other one, and says at least half of the first 200 objects, or as many as the other.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from lasted import figure
from lasting import METHODS as METHODS_OF_TABLE
from lasting import Organism, point_of
from marked import between
from marked import table as in_markdown
from transformers import GPT2Config
from widened import widened

import editkit
from editkit.data import load_cases
from editkit.data.cases import Case
from editkit.data.kinds import NEIGHBORHOOD, PARAPHRASE
from editkit.files import write_text
from editkit.runs import names
from editkit.settings import DataSettings

HERE = Path(__file__).parent
METHODS = ("memit", "memit_seq", "alphaedit")
FACTS = (100, 300, 1000)
EDITS = 2000
ONCE = 500  # facts of the stream of subjects
UNTOUCHED = 20  # and those of it that are never edited
STREAMS = {str(facts): [f"data.stream={EDITS}", f"data.limit={facts}"] for facts in FACTS}
STREAMS["subjects"] = ["data=counterfact", f"data.limit={ONCE}"]  # and its file
STREAMS["neurons"] = STREAMS["1000"]  # on another model
NEURONS = 3072  # a block
TITLES = {"subjects": f"{ONCE}, one a subject", "neurons": f"1,000, {NEURONS:,} neurons a block"}
DESCENT = "method.solver=descent"  # as in lasting.py
JUDGED = 200  # edits after which a trial's answers are judged
BATCH = 100  # facts a step


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
    Trial("memit", "method.clamp=2", "memit, NAS"),
    Trial("memit", "method.clamp=1", "memit, NAS"),
    # Where unrouted's own trace finds recall (task=trace data=atlas data.limit=30): block 0, then 1.
    Trial("memit", "method.layers=[0,1]", "memit", "unrouted", "atlas"),
    Trial("alphaedit", "method.layers=[0,1]", "alphaedit", "unrouted", "atlas"),
)


def cells(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Method, stream and folder of each cell. MEMIT-Seq is run where it is asked what a memory of keys does."""
    for method in METHODS:
        for stream in STREAMS:
            if method != "memit_seq" or stream == "subjects":
                yield method, stream, folder / f"{method}-{stream}"


def run(folder: Path, model: str) -> None:
    """Every cell of a model that has not ended. Only the bundled one has other streams."""
    organism = Organism(model)
    facts = folder / "subjects.json"
    write_text(facts, json.dumps(one_a_subject(), ensure_ascii=False))
    for method, stream, path in cells(folder) if organism.title == "atlas" else ():
        keys = [f"method={method}", DESCENT, *STREAMS[stream]]
        keys += [f"data.path={facts}"] if stream == "subjects" else []
        keys += [f"model.name={more_neurons(folder)}"] if stream == "neurons" else []
        _run(path, keys)
    for trial in TRIALS:
        if trial.model == organism.title:
            solver = [DESCENT] if DESCENT in METHODS_OF_TABLE[trial.method] else []
            blocks = [f"method.{key}={value}" for key, value in organism.blocks(trial.method).items()]
            kept = [text for text in blocks if text.split("=")[0] != trial.change.split("=")[0]]
            keys = [f"method={trial.method}", *solver, *kept, trial.change, f"model.name={model}", *STREAMS["1000"]]
            _run(folder / organism.title / trial.cell, keys)


def _run(path: Path, keys: list[str]) -> None:
    """Run a cell to its end, from where it stopped."""
    if (path / names.RECORD).exists():
        return
    keys = ["task=lifelong", *keys, f"task.step={BATCH}", "task.every=null", "task.at=[100,200,300,400,500,1000]"]
    keys += ["task.keep=1", "task.alarm.every=1", "task.alarm.growth=null", "task.alarm.per_fact=null"]
    keys += ["task.on_collapse=stop", "task.measure.distracted=false", f"hydra.run.dir={path}"]
    resume = ["resume=true"] if (path / names.POINT_LINES).exists() else []
    print(path.name, flush=True)
    if code := subprocess.call([sys.executable, "-m", "editkit.run", *keys, *resume]):
        sys.exit(code)


def one_a_subject() -> list[dict[str, Any]]:
    """The first fact of each subject in the order of the other streams, as CounterFact's records."""
    first: dict[str, Case] = {}
    for case in load_cases(DataSettings(), seed=0, distinct=True).cases:
        first.setdefault(case.fact.subject, case)
    chosen = list(first.values())[: ONCE + UNTOUCHED]
    if len(chosen) < ONCE + UNTOUCHED:
        raise SystemExit(f"The atlas has only {len(chosen)} subjects.")
    return [
        {
            "case_id": number,
            "requested_rewrite": {
                "prompt": case.fact.prompt,
                "subject": case.fact.subject,
                "target_new": {"str": case.fact.target_new},
                "target_true": {"str": case.fact.target_true},
            },
            "paraphrase_prompts": [probe.prompt for probe in case.probes if probe.kind == PARAPHRASE],
            "neighborhood_prompts": [probe.prompt for probe in case.probes if probe.kind == NEIGHBORHOOD],
            "attribute_prompts": [],
            "generation_prompts": [],
        }
        for number, case in enumerate(chosen)
    ]


def more_neurons(folder: Path) -> Path:
    """The bundled model with NEURONS a block and the same answers; its folder's name gives it the same constants."""
    path = folder / "neurons" / "atlas"
    if not (path / "config.json").exists():
        small = editkit.load("atlas", device="cpu")
        sizes: dict[str, Any] = small.model.config.to_dict() | {"n_inner": NEURONS}
        config = GPT2Config(**sizes)
        wide = widened(small, config, "atlas")
        wide.model.save_pretrained(path)
        wide.tokenizer.save_pretrained(path)
    return path


def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Where each cell that has ended broke, and what it was like there."""
    streams = [{"method": m, "stream": stream, **ended} for m, stream, path in cells(folder) if (ended := _end(path))]
    trials = [
        {"method": trial.method, "model": trial.model, "change": trial.change, **ended}
        for trial in TRIALS
        if (ended := _end(folder / trial.model / trial.cell))
    ]
    return {"streams": streams, "trials": trials}


def _end(path: Path) -> dict[str, Any] | None:
    """Of a cell: where it broke or ended, and its scores after JUDGED edits."""
    if not (path / names.RECORD).exists():
        return None
    record = json.loads((path / names.RECORD).read_text(encoding="utf-8"))
    last, broken = record["series"][-1], record["data"].get("collapse")
    found = {
        "broken": broken and broken["edits_kept"],
        "edits": last["edits"],
        "growth": last["alarm"]["growth"],
        "perplexity": last["alarm"]["perplexity"],
        "commit": record["environment"]["commit"],
    }
    lines = (path / names.POINT_LINES).read_text(encoding="utf-8").splitlines()
    point = next((row for line in lines if (row := json.loads(line)).get("edits") == JUDGED), None)
    return found | ({"judged": point_of(point)} if point else {})


def table(found: list[dict[str, Any]]) -> list[str]:
    """A row a stream and method."""
    rows = []
    for row in found:
        facts = TITLES.get(row["stream"]) or f"{int(row['stream']):,}"
        rows.append([row["method"], facts, _ending(row), f"{row['growth']:.3g}", f"{row['perplexity']:.3g}"])
    return in_markdown(["method", "facts", "broken at", "‖ΔW‖/‖W‖ there", "perplexity ×"], rows)


def _ending(row: dict[str, Any]) -> str:
    return f"{row['broken']:,}" if row["broken"] is not None else f"not by {row['edits']:,}"


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
        explains = _life(mine) >= _life(other) and said is not None and said[0] >= min(0.5, _said(other))
        at_model = f" on {other_model}" if trial.other_model else ""
        rows.append(
            [
                f"{trial.method} on {trial.model}",
                f"`{trial.change}`",
                _ending(unchanged),
                _ending(mine),
                figure(said),
                figure(point.get("untouched")),
                f"{trial.other}{at_model}: {_ending(other)}",
                "yes" if explains else "no",
            ]
        )
    head = ["method", "change", "broken at, without", "with", f"said freely, {JUDGED}", f"untouched, {JUDGED}"]
    return in_markdown([*head, "the other method", "explains it"], rows)


def _key(trial: Trial) -> tuple[str, str, str]:
    return trial.method, trial.model, trial.change


def _cell(plain: list[dict[str, Any]], method: str, model: str) -> dict[str, Any]:
    return next(c for c in plain if (c["method"], c["model"], c["batch"]) == (method, model, BATCH))


def _said(cell: dict[str, Any]) -> float:
    """The share of objects that a cell of lasting.json says freely after JUDGED edits; 1 where it has no such point."""
    share: float = next((point["said freely"][0] for point in cell["points"] if point["edits"] == JUDGED), 1.0)
    return share


def _life(row: dict[str, Any]) -> float:
    """Edits until it broke; without end where it did not."""
    return float("inf") if row["broken"] is None else row["broken"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "results"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="atlas", help="atlas, or the folder of an organism: its trials")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    if chosen.what == "run":
        run(folder, chosen.model)
        return
    found = results(folder)
    write_text(HERE / "why.json", json.dumps(found, indent=1) + "\n")
    between(HERE / "README.md", "why", table(found["streams"]))
    plain = json.loads((HERE / "lasting.json").read_text(encoding="utf-8"))
    between(HERE / "README.md", "trials", tried(found["trials"], plain))


if __name__ == "__main__":
    main()
