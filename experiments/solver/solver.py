"""Adam and descent on the same facts: write the rows of one part of the study. See README.md.

    python experiments/solver/solver.py --out ROWS.jsonl          # goes on where it was stopped
    python experiments/solver/solver.py --out ROWS.jsonl --model FOLDER --name "training seed 1"
    python experiments/solver/solver.py --out ROWS.jsonl --n 20 --blocks 4 --methods r_rome   # a quick look

One line a cell: its settings, and for each fact the evaluations, the losses, ‖δ‖ / ‖v0‖, the clamp and its scores.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from editkit import load
from editkit.data.atlas import atlas_benchmark
from editkit.data.cases import Case
from editkit.data.kinds import NEIGHBORHOOD, PARAPHRASE, REWRITE, SAME_SUBJECT, UNSEEN
from editkit.edits import Edit
from editkit.methods import get_method
from editkit.methods.rome import rome_each
from editkit.methods.shared.contexts import context_templates
from editkit.metrics.measure import Look, by_column, look, rows_of, scores_of_rows
from editkit.models.load import LanguageModel
from editkit.moments import second_moments
from editkit.settings import MeasureSettings, MethodSettings, MomentSettings

BATCH = 100  # facts that a batch method writes at once
ASKED = (REWRITE, PARAPHRASE, UNSEEN, NEIGHBORHOOD, SAME_SUBJECT)
MEASURE = MeasureSettings(generate=2, fluency=0, distracted=False)
SCORES = ("ES", "PS", "NS", "unseen_PS", "same_subject")  # counterfact's; and what is said freely
FREELY = ("rewrite", "unseen_paraphrase")


def study_cases(n: int, seed: int) -> list[Case]:
    """The first `n` cases of the benchmark, with the probes that the study asks."""
    cases = atlas_benchmark(seed=seed)[:n]
    return [replace(case, probes=tuple(p for p in case.probes if p.kind in ASKED)) for case in cases]


def batches(cases: Sequence[Case], size: int) -> Iterator[list[int]]:
    """Indices of `cases`, in parts of at most `size` that hold no subject twice: one edit cannot write it twice."""
    waiting = list(range(len(cases)))
    while waiting:
        part: dict[str, int] = {}
        for i in waiting:
            if len(part) < size:
                part.setdefault(cases[i].fact.subject, i)
        yield sorted(part.values())
        waiting = [i for i in waiting if i not in set(part.values())]


def scores(case: Case, before: Look, after: Look) -> dict[str, float | None]:
    """What the study keeps of a case, after the edit."""
    found = by_column(scores_of_rows(rows_of(case, before, after)))
    kept = {name: found[f"counterfact.{name}_after"] for name in SCORES}
    return kept | {f"says_{name}": found[f"generation.{name}_after"] for name in FREELY}


def edits(
    lm: LanguageModel, method: str, cases: Sequence[Case], settings: MethodSettings, seed: int
) -> Iterator[tuple[list[int], Edit]]:
    """The edits of one cell, each with the indices of its cases."""
    resolved = settings.resolved("atlas", lm.layers)
    shared: dict[str, Any] = {
        "moments": second_moments(lm, resolved.blocks, MomentSettings(), seed=seed),
        "contexts": context_templates(lm, resolved.contexts, seed),  # type: ignore[attr-defined]
        "seed": seed,
    }
    if method == "r_rome":
        found = rome_each(lm, [case.fact for case in cases], resolved, **shared)  # type: ignore[arg-type]
        yield from (([i], edit) for i, edit in enumerate(found))
        return
    for part in batches(cases, BATCH):
        yield part, get_method(method)(lm, [cases[i].fact for i in part], resolved, **shared)


def cell(
    lm: LanguageModel, method: str, cases: Sequence[Case], settings: MethodSettings, befores: Sequence[Look], seed: int
) -> list[dict[str, Any]]:
    """A row for each case: how its value was found, and its scores while its edit is applied."""
    rows: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(cases), desc=f"{method} {settings.blocks} {settings.solver}", mininterval=5) as bar:  # type: ignore[attr-defined]
        for part, edit in edits(lm, method, cases, settings, seed):
            with edit.applied(lm, check=False, everything=False):
                for i, report in zip(part, edit.provenance["reports"], strict=True):
                    rows[i] = {
                        "case": cases[i].id,
                        "losses": [round(step["loss"], 4) for step in report["steps"]],
                        "norm": report["delta_norm"] / report["v0_norm"],
                        "clamp_hit": report["clamp_hit"],
                        **scores(cases[i], befores[i], look(lm, cases[i], MEASURE)),
                    }
                    bar.update()
    return [rows[i] for i in sorted(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="rows, one line a cell; cells already there are kept")
    parser.add_argument("--model", default="atlas", help="atlas, or a folder with a model trained on the atlas")
    parser.add_argument("--name", default=None, help="what the rows call the model; default: --model")
    parser.add_argument("--n", type=int, default=300, help="cases of each seed")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--blocks", default="3,4,5", help="of r_rome; the others write their own range")
    parser.add_argument("--methods", default="r_rome,memit")
    parser.add_argument("--solvers", default="adam,descent", help="descent:0.07 is descent with that stop_loss")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm, name = load(options.model, device="cpu"), options.name or options.model
    there = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    done = {json.dumps(json.loads(line)["cell"]) for line in there}
    for seed in map(int, options.seeds.split(",")):
        cases, befores = study_cases(options.n, seed), list[Look]()
        for method in options.methods.split(","):
            kind = get_method(method).settings
            blocks: list[dict[str, Any]] = [{}]
            if method == "r_rome":
                blocks = [{"layer": int(b)} for b in options.blocks.split(",")]
            for where in blocks:
                for solver in options.solvers.split(","):
                    about = {"model": name, "seed": seed, "method": method, **where, "solver": solver, "n": options.n}
                    if json.dumps(about) in done:
                        continue
                    befores = befores or [look(lm, case, MEASURE) for case in tqdm(cases, desc="before", mininterval=5)]
                    name_of, _, stop = solver.partition(":")
                    chosen: dict[str, Any] = where | {"solver": name_of} | ({"stop_loss": float(stop)} if stop else {})
                    settings = kind(**chosen)
                    rows = cell(lm, method, cases, settings, befores, seed)
                    line = {"cell": about, "digest": lm.digest, "rows": rows}
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
