"""Other ways to step, on facts that the study does not use. See README.md, "What else was tried".

    python experiments/solver/variants.py --json experiments/solver/variants.json    # goes on where it was stopped

Each variant changes one thing of descent as it is (editkit/methods/shared/solvers.py), or of the settings.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from solver import FREELY, MEASURE, SCORES, cell, study_cases
from torch import Tensor

from editkit import load
from editkit.data.cases import Case
from editkit.files import write_text
from editkit.methods import get_method
from editkit.methods.shared import solvers
from editkit.methods.shared.solvers import Descent
from editkit.metrics.measure import look

STUDIED, SEEDS, DRAWN_WITH = 300, (0, 1), 2  # the study's cases, which are left out here
AS_IT_IS = "descent, as it is"


class TrustRadius(Descent):
    """Always as far as the trust radius allows: steepest descent without Polyak's length."""

    def _length(self) -> Tensor:
        return torch.full_like(self._loss, 1e6) / self._gradient.square().sum((0, 2)).sqrt()


class LogOdds(Descent):
    """To where the log-odds of the target would be the aim, were they linear in δ: exact for one token and two answers.

    With p = exp(−loss), the log-odds z = log(p / (1 − p)) and dz/dδ = −g / (1 − p).
    """

    def _length(self) -> Tensor:
        now, aim = (torch.expm1(x).log() for x in (self._loss, torch.full_like(self._loss, self._aim)))  # −z
        return (now - aim) * -torch.expm1(-self._loss) / self._gradient.square().sum((0, 2))


class Longer(Descent):
    """1.3 times Polyak's step."""

    def _length(self) -> Tensor:
        return 1.3 * super()._length()


@dataclass(frozen=True)
class Variant:
    """What is changed."""

    settings: dict[str, Any] = field(default_factory=lambda: {"solver": "descent"})
    constants: dict[str, float] = field(default_factory=dict)  # of solvers.py
    kind: type[Descent] = Descent

    @contextmanager
    def made(self) -> Iterator[None]:
        """In the body descent is this."""
        changed: dict[str, Any] = {"Descent": self.kind, **self.constants}
        with patch.multiple(solvers, **changed):
            yield


VARIANTS = {
    "Adam": Variant({"solver": "adam"}),
    AS_IT_IS: Variant(),
    "stop_loss .1": Variant({"solver": "descent", "stop_loss": 0.1}),
    "stop_loss .2": Variant({"solver": "descent", "stop_loss": 0.2}),
    "stop_loss .02": Variant({"solver": "descent", "stop_loss": 0.02}),
    "aim .2 of stop_loss": Variant(constants={"AIM": 0.2}),
    "aim .8 of stop_loss": Variant(constants={"AIM": 0.8}),
    "first radius .3 ‖v0‖": Variant(constants={"FIRST_RADIUS": 0.3}),
    "first radius 3 ‖v0‖": Variant(constants={"FIRST_RADIUS": 3.0}),
    "1.3 times the step": Variant(kind=Longer),
    "no length but the radius": Variant(constants={"FIRST_RADIUS": 0.3}, kind=TrustRadius),
    "log-odds": Variant(kind=LogOdds),
    "log-odds, first radius .3 ‖v0‖": Variant(constants={"FIRST_RADIUS": 0.3}, kind=LogOdds),
}


def cases_left(n: int) -> list[Case]:
    """`n` cases that the study does not have, each about another subject."""
    studied = {case.id for seed in SEEDS for case in study_cases(STUDIED, seed)}
    free: dict[str, Case] = {}
    for case in study_cases(10**9, DRAWN_WITH):
        if case.id not in studied:
            free.setdefault(case.fact.subject, case)
    return list(free.values())[:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="write the figures here; rows already there are kept")
    parser.add_argument("--n", type=int, default=70, help="cases")
    parser.add_argument("--places", default="r_rome 3,r_rome 4,r_rome 5,memit", help="method and block")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm, cases = load("atlas", device="cpu"), cases_left(options.n)
    befores = [look(lm, case, MEASURE) for case in cases]
    found: dict[str, dict[str, dict[str, float]]] = (
        json.loads(options.json.read_text()) if options.json.exists() else {}
    )
    for place in options.places.split(","):
        method, *block = place.split()
        for name, variant in VARIANTS.items():
            if name in found.setdefault(place, {}):
                continue
            where: dict[str, Any] = {"layer": int(block[0])} if block else {}
            settings = get_method(method).settings(**where, **variant.settings)
            with variant.made():
                rows = cell(lm, method, cases, settings, befores, DRAWN_WITH)
            found[place][name] = {
                "evaluations": fmean(len(row["losses"]) for row in rows),
                "most": max(len(row["losses"]) for row in rows),
                "norm": fmean(row["norm"] for row in rows),
                **{
                    key: fmean(row[key] for row in rows if row[key] is not None)
                    for key in (*SCORES, *(f"says_{kind}" for kind in FREELY))
                },
            }
            write_text(options.json, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            print(f"{place:9} {name:32}" + "".join(f"{k} {v:.3f}  " for k, v in found[place][name].items()), flush=True)


if __name__ == "__main__":
    main()
