"""Where the atlas model recalls its facts, whether an edit does best there, and what an edit does elsewhere.

    python experiments/where/where.py                    # all steps, then results.json, tables in README.md, where.png
    python experiments/where/where.py --steps report     # the tables and pictures again, from what is measured

Steps: `trace` and `severed` (average traces), `edits` (one R-ROME edit a fact and block), `side` (side effects,
predicted and measured), `report`. What is measured is kept in --work as it comes, so a run that was stopped goes on.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from report import report
from tqdm import tqdm

from editkit import LanguageModel, RRomeSettings, TraceSettings, average_trace, load, r_rome, side_effects
from editkit.corpora import load_atlas
from editkit.data.atlas import atlas_benchmark
from editkit.data.cases import ATTRIBUTE, Case
from editkit.files import write_text
from editkit.methods.shared.prelude import shared_inputs
from editkit.metrics.measure import look, rows_of, values_of_rows
from editkit.metrics.scoring import score_targets
from editkit.runs.journal import Journal
from editkit.runs.record import environment
from editkit.settings import MeasureSettings

HERE = Path(__file__).parent
STEPS = ("trace", "severed", "edits", "side", "report")
KINDS = {"trace": ("state", "mlp", "attention"), "severed": ("severed_mlp", "severed_attention")}
MEASURE = MeasureSettings(generate=0, fluency=0, distracted=False)


def traced(lm: LanguageModel, cases: Sequence[Case], step: str, work: Path) -> None:
    """The average trace of the cases' facts, of the step's kinds, with the wall and processor seconds it took."""
    if (work / f"{step}_seconds.json").exists():
        return
    began, worked = time.perf_counter(), time.process_time()
    found = average_trace(lm, [case.fact for case in cases], TraceSettings(kinds=KINDS[step]))
    if not found.complete:
        raise KeyboardInterrupt
    found.save(work / step)
    seconds = {"wall": time.perf_counter() - began, "processor": time.process_time() - worked}
    write_text(work / f"{step}_seconds.json", json.dumps(seconds | environment(lm)))


def measured(path: Path, header: dict[str, Any], jobs: Sequence[Any], one: Callable[[Any], dict[str, Any]]) -> None:
    """A line of the journal for each job that has none."""
    with Journal(path, header, resume=path.exists()) as journal:
        done = {json.dumps(line["job"]) for line in journal.lines}
        left = [job for job in jobs if json.dumps(job) not in done]
        for job in tqdm(left, desc=path.stem, delay=1):
            began = time.perf_counter()
            found = one(job)
            journal.append({"job": job, "seconds": round(time.perf_counter() - began, 3)} | found)


def edits(lm: LanguageModel, cases: Sequence[Case], work: Path) -> None:
    """Each fact edited at each block, and every probe of its case asked before and after."""
    blocks = range(lm.layers - 1)  # what the last puts out at the subject reaches no other token
    shared = {b: shared_inputs(lm, RRomeSettings(layer=b), None, 0, True) for b in blocks}
    befores: dict[int, Any] = {}

    def one(job: list[int]) -> dict[str, Any]:
        number, block = job
        case = cases[number]
        if number not in befores:
            befores[number] = look(lm, case, MEASURE)
        edit = r_rome(lm, case.fact, RRomeSettings(layer=block), progress=False, **shared[block])
        with edit.applied(lm, check=False, everything=False):
            after = look(lm, case, MEASURE)
        values = values_of_rows(rows_of(case, befores[number], after))
        report_ = edit.provenance["reports"][0]
        return {"text": case.fact.text, "norm": edit.norm(), "delta": report_["delta_norm"], "values": values}

    jobs = [[number, block] for number in range(len(cases)) for block in blocks]  # fact by fact
    measured(work / "edits.jsonl", {"model": lm.digest}, jobs, one)


def side(lm: LanguageModel, cases: Sequence[Case], others: int, work: Path) -> None:
    """For each edit: predictions for a sample of other facts and all of the subject's own, and what became of them."""
    atlas, shared = load_atlas(), shared_inputs(lm, RRomeSettings(), None, 0, True)
    before: dict[tuple[str, str], Any] = {}

    def one(number: int) -> dict[str, Any]:
        fact = cases[number].fact
        known = [f for f in atlas.facts if f.subject != fact.subject]
        asked = random.Random(number).sample(known, others)
        own = [f for f in atlas.by_subject[fact.subject] if f.relation != cases[number].relation]
        pairs = [(atlas.trained_pairs(f)[0].format(f.subject), f.object) for f in (*asked, *own)]
        edit = r_rome(lm, fact, progress=False, **shared)
        prompts, targets = [list(each) for each in zip(*pairs, strict=True)]
        began = time.perf_counter()
        said = side_effects(lm, edit, prompts, targets)
        seconds = time.perf_counter() - began
        new = [i for i, pair in enumerate(pairs) if pair not in before]
        scores = score_targets(lm, [prompts[i] for i in new], [targets[i] for i in new])
        before.update(zip([pairs[i] for i in new], scores, strict=True))
        with edit.applied(lm, check=False, everything=False):
            after = score_targets(lm, prompts, targets)
        assert said.drop is not None
        columns = {
            "sibling": [0] * len(asked) + [1] * len(own),
            "lost": [now.nll - before[pair].nll for pair, now in zip(pairs, after, strict=True)],
            "known": [int(before[pair].greedy) for pair in pairs],
            "kept": [int(now.greedy) for now in after],
        }
        for name in ("change", "relative", "cosine", "cosine_key", "drop"):
            columns[name] = getattr(said, name).tolist()
        return {"text": fact.text, "predicting": seconds, "columns": columns}

    measured(work / "side.jsonl", {"model": lm.digest, "others": others}, list(range(len(cases))), one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--facts", type=int, default=100, help="traced, and edited once for their side effects")
    parser.add_argument("--edited", type=int, default=50, help="of these, edited at every block")
    parser.add_argument("--others", type=int, default=100, help="facts asked beside each edit")
    parser.add_argument("--work", type=Path, default=Path("outputs/where"), help="folder of what is measured")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lm = load("atlas", device="cpu")
    # The benchmark's order of facts; attribute prompts are not asked here.
    cases = [
        Case(case.facts, tuple(p for p in case.probes if p.kind != ATTRIBUTE), case.id, case.relation)
        for case in atlas_benchmark()[: chosen.facts]
    ]
    chosen.work.mkdir(parents=True, exist_ok=True)
    for step in chosen.steps:
        if step in KINDS:
            traced(lm, cases, step, chosen.work)
        elif step == "edits":
            edits(lm, cases[: chosen.edited], chosen.work)
        elif step == "side":
            side(lm, cases, chosen.others, chosen.work)
        else:
            report(chosen.work, HERE)


if __name__ == "__main__":
    main()
