"""Every method on the atlas model: facts one at a time, in one batch, and in a session of batches.

    python experiments/methods/compare.py --singles 30 --batch 50 --session 5x10 --json experiments/methods/results.json

After each, all probes of all its facts are asked. Shares are of CounterFact's comparisons (ES, PS, NS) and of answers
still said (same subject); "follows" are two-hop prompts whose new answer is likelier than the old. Rows that are in
the JSON file already are kept, so a run that was stopped goes on.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from editkit import Session, load
from editkit.data.atlas import atlas_cases
from editkit.data.cases import Case
from editkit.edit import Edit, weight_norm
from editkit.files import write_text
from editkit.methods import METHODS
from editkit.metrics.counterfact import ProbeScore, score_probes
from editkit.models.load import LanguageModel

COLUMNS = ("ES", "PS", "unseen", "NS", "same", "follows")
TITLES = (*COLUMNS, "rank", "norm", "seconds")
NAMES = {"rewrite": "ES", "paraphrase": "PS", "unseen_paraphrase": "unseen", "neighborhood": "NS"}
NAMES |= {"same_subject": "same", "portability": "follows"}


def tally(outcomes: dict[str, list[bool]], before: Sequence[ProbeScore], after: Sequence[ProbeScore]) -> None:
    """Add one case's probes: whether the new answer wins, or the old one is kept where it was there before."""
    for b, a in zip(before, after, strict=True):
        name = NAMES[b.probe.kind]
        if name == "NS":
            outcomes[name].append(bool(a.true_wins))
        elif name == "same":
            if b.true is not None and a.true is not None and b.true.greedy:
                outcomes[name].append(a.true.greedy)
        elif name != "follows" or (b.true is not None and b.true.greedy):
            outcomes[name].append(bool(a.new_wins))


def row_of(outcomes: dict[str, list[bool]], rank: int, norm: float, seconds: float) -> dict[str, Any]:
    shares = {name: sum(outcomes[name]) / len(outcomes[name]) if outcomes[name] else None for name in COLUMNS}
    return shares | {
        "n": {name: len(outcomes[name]) for name in COLUMNS},
        "rank": rank,
        "norm": norm,
        "seconds": seconds,
    }


def measured(lm: LanguageModel, edit: Edit, cases: Sequence[Case], before: Sequence[list[ProbeScore]], seconds: float):
    """The row of one edit of all `cases`."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    norm = edit.norm() / weight_norm(lm, edit)
    with edit.applied(lm):
        for case, scores in zip(cases, before, strict=True):
            tally(outcomes, scores, score_probes(lm, case.probes))
    return row_of(outcomes, edit.rank, norm, seconds)


def singles(
    lm: LanguageModel, method: str, cases: Sequence[Case], before: Sequence[list[ProbeScore]]
) -> dict[str, Any]:
    """Each fact alone: shares over all probes; rank, norm and seconds are means."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    ranks, norms, times = [], [], []
    for case, scores in zip(tqdm(cases, desc=f"{method}, one at a time", leave=False), before, strict=True):
        began = time.perf_counter()
        edit = METHODS[method].load()(lm, case.fact, progress=False)
        times.append(time.perf_counter() - began)
        ranks.append(edit.rank)
        norms.append(edit.norm() / weight_norm(lm, edit))
        with edit.applied(lm):
            tally(outcomes, scores, score_probes(lm, case.probes))
    return row_of(outcomes, max(ranks), sum(norms) / len(norms), sum(times) / len(times))


def batch(lm: LanguageModel, method: str, cases: Sequence[Case], before: Sequence[list[ProbeScore]]) -> dict[str, Any]:
    """All facts in one edit."""
    began = time.perf_counter()
    edit = METHODS[method].load()(lm, [case.fact for case in cases], progress=False)
    return measured(lm, edit, cases, before, time.perf_counter() - began)


def session(lm: LanguageModel, method: str, cases: Sequence[Case], before: Sequence[list[ProbeScore]], size: int):
    """Facts in steps of `size`, each computed on what the earlier ones left; asked at the end."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    began = time.perf_counter()
    with Session(lm, method, progress=False) as steps:
        for first in range(0, len(cases), size):
            steps.edit([case.fact for case in cases[first : first + size]])
        seconds = time.perf_counter() - began
        for case, scores in zip(cases, before, strict=True):
            tally(outcomes, scores, score_probes(lm, case.probes))
        total = steps.total()
    return row_of(outcomes, total.rank, total.norm() / weight_norm(lm, total), seconds)


def distinct(n: int) -> list[Case]:
    """Atlas cases whose prompts differ: a batch may not ask two answers of one prompt."""
    cases: dict[str, Case] = {}
    for case in atlas_cases(2 * n):
        cases.setdefault(case.fact.text, case)
    return list(cases.values())[:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m != "mend"], choices=METHODS)
    parser.add_argument("--singles", type=int, default=30, help="facts edited one at a time; 0: none")
    parser.add_argument("--batch", type=int, default=200, help="facts in one batch; 0: none")
    parser.add_argument("--session", default="10x20", metavar="STEPSxFACTS", help="0x0: none")
    parser.add_argument("--dtype", default="float32", help="of the model: float32, bfloat16, float16")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here; rows already there are kept")
    options = parser.parse_args()
    steps, size = (int(part) for part in options.session.split("x"))

    lm = load("atlas", device="cpu", dtype=options.dtype)
    found: dict[str, Any] = {
        "digest": lm.digest,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "rows": {},
    }
    if options.json and options.json.is_file():
        kept = json.loads(options.json.read_text(encoding="utf-8"))
        found = kept if kept["digest"] == lm.digest else found
    print(f"{'':34}" + "".join(f"{title:>9}" for title in TITLES))
    parts: list[tuple[str, int, Callable[..., dict[str, Any]]]] = [
        (f"{options.singles} singles", options.singles, singles),
        (f"batch of {options.batch}", options.batch, batch),
        (f"session {steps} × {size}", steps * size, lambda *given: session(*given, size)),
    ]
    for what, count, measure in parts:
        cases = distinct(count)
        before = [score_probes(lm, case.probes) for case in cases]
        for method in options.methods if count else ():
            name = f"{method}, {what}"
            if name not in found["rows"]:
                found["rows"][name] = measure(lm, method, cases, before)
                if options.json:
                    write_text(options.json, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            row = found["rows"][name]
            cells = ["-" if row[title] is None else f"{row[title]:.3g}" for title in TITLES]
            print(f"{name:34}" + "".join(f"{cell:>9}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
