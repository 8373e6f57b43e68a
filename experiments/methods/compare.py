"""Every method on the atlas model: facts one at a time, in one batch, and in a session of batches.

    python experiments/methods/compare.py --json experiments/methods/results.json       # 50 singles, 200, 10 × 20

After each, all probes of all its facts are asked. Shares are of CounterFact's comparisons (ES, PS, NS) and of answers
still said (same subject); "follows" are two-hop prompts whose new answer is likelier than the old. Intervals are 95 %
by bootstrap over facts. Rows that are in the JSON file already are kept, so a run that was stopped goes on.

The README's null controls are a run of their own, by task.controls=true.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from editkit import Session, load
from editkit.data.atlas import atlas_cases
from editkit.data.cases import Case
from editkit.edits.edit import Edit, relative_norm
from editkit.files import write_text
from editkit.methods import get_method, names
from editkit.methods.rome import RomeSettings, rome_each
from editkit.metrics.scoring import ProbeScore, score_probes
from editkit.models.load import LanguageModel

COLUMNS = ("ES", "PS", "unseen", "NS", "same", "follows")
TITLES = (*COLUMNS, "rank", "norm", "seconds")
NAMES = {"rewrite": "ES", "paraphrase": "PS", "unseen_paraphrase": "unseen", "neighborhood": "NS"}
RESAMPLES = 2000
Outcomes = dict[str, list[bool]]  # of one case
NAMES |= {"same_subject": "same", "portability": "follows"}


def tally(before: Sequence[ProbeScore], after: Sequence[ProbeScore]) -> Outcomes:
    """One case's probes: whether the new answer wins, or the old one is kept where it was there before."""
    outcomes: Outcomes = defaultdict(list)
    for b, a in zip(before, after, strict=True):
        name = NAMES[b.probe.kind]
        if name == "NS":
            outcomes[name].append(bool(a.true_wins))
        elif name == "same":
            if b.true is not None and a.true is not None and b.true.greedy:
                outcomes[name].append(a.true.greedy)
        elif name != "follows" or (b.true is not None and b.true.greedy):
            outcomes[name].append(bool(a.new_wins))
    return outcomes


def row_of(cases: Sequence[Outcomes], rank: int, norm: float, seconds: float) -> dict[str, Any]:
    """Shares over all probes of all cases, with n, and a bootstrap over cases."""
    counts = {name: ([sum(case[name]) for case in cases], [len(case[name]) for case in cases]) for name in COLUMNS}
    drawn = torch.randint(len(cases), (RESAMPLES, len(cases)), generator=torch.Generator().manual_seed(0))
    shares, intervals = {}, {}
    for name, (hits, asked) in counts.items():
        shares[name] = sum(hits) / sum(asked) if sum(asked) else None
        each = torch.tensor([hits, asked], dtype=torch.double)[:, drawn].sum(-1)  # [2, resamples]
        found = (each[0] / each[1])[each[1] > 0]
        intervals[name] = found.quantile(torch.tensor([0.025, 0.975]).double()).tolist() if len(found) else None
    n = {name: sum(asked) for name, (_, asked) in counts.items()}
    return shares | {"n": n, "interval": intervals, "rank": rank, "norm": norm, "seconds": seconds}


def each_alone(
    lm: LanguageModel, edits: Sequence[Edit], cases: Sequence[Case], before: Sequence[list[ProbeScore]], seconds: float
) -> dict[str, Any]:
    """The row of one edit a case: shares over all probes, means of norm and seconds."""
    outcomes = []
    for edit, case, scores in zip(tqdm(edits, desc="applied", leave=False), cases, before, strict=True):
        with edit.applied(lm, check=False):
            outcomes.append(tally(scores, score_probes(lm, case.probes)))
    norm = sum(relative_norm(lm, edit) for edit in edits) / len(edits)
    return row_of(outcomes, max(edit.rank for edit in edits), norm, seconds / len(edits))


def singles(
    lm: LanguageModel, method: str, cases: Sequence[Case], before: Sequence[list[ProbeScore]]
) -> dict[str, Any]:
    """Each fact alone."""
    began = time.perf_counter()
    if method in ("rome", "r_rome"):
        settings = get_method(method).settings()
        assert isinstance(settings, RomeSettings)
        edits = rome_each(lm, [case.fact for case in cases], settings, progress=False)
    else:
        compute = get_method(method)
        edits = [compute(lm, case.fact, progress=False) for case in tqdm(cases, desc=method, leave=False)]
    return each_alone(lm, edits, cases, before, time.perf_counter() - began)


def batch(lm: LanguageModel, method: str, cases: Sequence[Case], before: Sequence[list[ProbeScore]]) -> dict[str, Any]:
    """All facts in one edit."""
    began = time.perf_counter()
    edit = get_method(method)(lm, [case.fact for case in cases], progress=False)
    seconds, norm = time.perf_counter() - began, relative_norm(lm, edit)
    with edit.applied(lm):
        outcomes = [tally(scores, score_probes(lm, case.probes)) for case, scores in zip(cases, before, strict=True)]
    return row_of(outcomes, edit.rank, norm, seconds)


def session(
    lm: LanguageModel, method: str, cases: Sequence[Case], before: Sequence[list[ProbeScore]], size: int
) -> dict[str, Any]:
    """Facts in steps of `size`, each computed on what the earlier ones left; asked at the end."""
    began = time.perf_counter()
    with Session(lm, method, progress=False) as steps:
        for first in tqdm(range(0, len(cases), size), desc=f"{method}, steps", leave=False):
            steps.edit([case.fact for case in cases[first : first + size]])
        seconds = time.perf_counter() - began
        outcomes = [tally(scores, score_probes(lm, case.probes)) for case, scores in zip(cases, before, strict=True)]
        total = steps.total()
    return row_of(outcomes, total.rank, relative_norm(lm, total), seconds)


def distinct(n: int) -> list[Case]:
    """Atlas cases whose prompts differ: a batch may not ask two answers of one prompt."""
    cases: dict[str, Case] = {}
    for case in atlas_cases(2 * n):
        cases.setdefault(case.fact.text, case)
    return list(cases.values())[:n]


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table of the README: shares with half the width of their intervals."""

    def cell(row: dict[str, Any], name: str) -> str:
        if row[name] is None:
            return "-"
        low, high = row["interval"][name]
        return f"{row[name]:.3f} ±{(high - low) / 2:.2f}".replace("±0.", "±.")

    lines = ["| | " + " | ".join((*COLUMNS, "rank", "‖ΔW‖/‖W‖", "seconds")) + " |", "|---" * (len(TITLES) + 1) + "|"]
    for name, row in rows.items():
        cells = [cell(row, column) for column in COLUMNS]
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {row['rank']} | {row['norm']:.2f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=names(), choices=names())
    parser.add_argument("--singles", type=int, default=50, help="facts edited one at a time; 0: none")
    parser.add_argument("--batch", type=int, default=200, help="facts in one batch; 0: none")
    parser.add_argument("--session", default="10x20", metavar="STEPSxFACTS", help="0x0: none")
    parser.add_argument("--dtype", default="float32", help="of the model: float32, bfloat16, float16")
    parser.add_argument("--markdown", action="store_true", help="print the rows of the JSON file as a table, and stop")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here; rows already there are kept")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text(encoding="utf-8"))["rows"]))
        return
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
        (f"session {steps} × {size}", steps * size, partial(session, size=size)),
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
