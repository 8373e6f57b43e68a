"""A step in the middle of a long session, undone: is that the same as never having made it, and how long does it take?

    python experiments/lasting/undo.py --json experiments/lasting/undo.json  # 1,000 steps; goes on if stopped
    python experiments/lasting/undo.py --steps 20 --undo 10 --folder FOLDER          # a quick look

Two answers to "never having made it", for a method that keeps the keys of earlier facts (memit_seq):

    kept    the other steps as they were computed. The weights after the undo must be theirs, bit for bit: they are
            compared with W0 + Σ Δ of these steps alone, summed here.
    again   every later step computed anew without it. How far Σ Δ of the two are apart is measured, and the time.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from editkit import Session, load
from editkit.data import load_cases
from editkit.edits import Edit
from editkit.files import write_text
from editkit.models.load import LanguageModel
from editkit.nethook import get_parameter
from editkit.sessionfiles import FILE
from editkit.settings import DataSettings

SAVE = 100  # steps between two saves


def session_of(lm: LanguageModel, folder: Path, method: str) -> Session:
    """The session in `folder`, or a new one."""
    if (folder / FILE).exists():
        return Session.load(folder, lm, progress=False)
    return Session(lm, method, progress=False)


def summed(lm: LanguageModel, steps: Sequence[Edit]) -> dict[str, Tensor]:
    """W0 + Σ ΔW of each parameter that the steps change, in their order, by the definition: in float64, cast once."""
    sums: dict[str, Tensor] = {}
    for step in steps:
        for delta in step.deltas:
            change = delta.left.double() @ delta.right.double() if delta.right is not None else delta.left.double()
            sums[delta.parameter] = sums[delta.parameter] + change if delta.parameter in sums else change
    found = {}
    for name, change in sums.items():
        weight = get_parameter(lm.model, name).detach()
        turned = change.T if weight.shape != change.shape else change
        found[name] = (weight.double() + turned).to(weight.dtype)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="memit_seq")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--undo", type=int, default=500, help="number of the step, from 0")
    parser.add_argument("--folder", type=Path, default=Path("outputs/undo"), help="where the session is kept")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lm = load("atlas", device="cpu")
    cases = load_cases(DataSettings(name="atlas", limit=options.steps), distinct=True).cases
    found: dict[str, Any] = {"method": options.method, "steps": len(cases), "undone": options.undo}
    with session_of(lm, options.folder, options.method) as session:
        # 1) The session as it is with the step.
        found["settings"] = asdict(session.settings)
        with tqdm(cases, desc="edits", initial=len(session.steps), unit="step") as bar:
            for case in cases[len(session.steps) :]:
                session.edit(case.fact)
                bar.update()
                if len(session.steps) % SAVE == 0 or len(session.steps) == len(cases):
                    session.save(options.folder)
        rest = [step for number, step in enumerate(session.steps) if number != options.undo]
        found["relative_norm"] = session.relative_norm()
        # 2) Undone, with the other steps as they are.
        began = time.perf_counter()
        session.undo(options.undo)
        found["kept"] = {"seconds": time.perf_counter() - began, "same_bits": False}
        undone = {name: get_parameter(lm.model, name).clone() for name in rest[0].parameters}
    wanted = summed(lm, rest)
    found["kept"]["same_bits"] = all(torch.equal(undone[name], wanted[name]) for name in wanted)
    # 3) Undone, with the later steps computed anew.
    with Session.load(options.folder, lm, progress=False) as session:
        began = time.perf_counter()
        apart = session.undo(options.undo, rerun=True).distance
        found["again"] = {"seconds": time.perf_counter() - began, "apart": apart}
    print(json.dumps(found, indent=2))
    if options.json:
        write_text(options.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
