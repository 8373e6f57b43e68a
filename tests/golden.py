"""The numbers of the authors' own code on the bundled atlas model, and ours for the same facts and settings.

The full files hold every ΔW; the fixture that the tests ship holds a few rows and columns of them, which is enough to
see each constant and the direction of the KL. It is made from the full files by

    python -m tests.golden FOLDER        # with rome.npz, memit.npz, alphaedit.npz; writes tests/fixtures/golden.npz
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import get_method
from editkit.methods.shared.prelude import Collected
from editkit.models.load import LanguageModel
from editkit.moments import SecondMoment, second_moments
from editkit.settings import MomentSettings

FIXTURE = Path(__file__).parent / "fixtures" / "golden.npz"
METHODS = ("rome", "memit", "alphaedit")
ROWS, COLUMNS = (31, 127), (100, 300, 500, 700)  # of ΔW [192, 768], kept in the fixture
BATCH = 3  # facts of each of AlphaEdit's batches

Array = NDArray[Any]


@dataclass(frozen=True)
class Golden:
    """One method's numbers. `changes`: ΔW [d_model, d_ff], or its `picked` part, by (fact or batch, block)."""

    method: str
    facts: tuple[Fact, ...]
    contexts: tuple[str, ...]
    layers: tuple[int, ...]
    hyperparameters: dict[str, float]
    ridge: float  # added to C's diagonal, as a fraction of its mean
    losses: tuple[float, ...]  # of each step, fact after fact, to three decimals
    changes: dict[tuple[int, int], Array]
    picked: bool
    moments: dict[int, Array] | None  # C + ridge [d_ff, d_ff]; None: what the defaults collect

    def difference(self, key: tuple[int, int], change: Array) -> float:
        """‖ours − theirs‖ / ‖theirs‖, of what is kept of theirs. `change`: our ΔW [d_model, d_ff]."""
        theirs = self.changes[key].astype(float)
        ours = picked(change) if self.picked else change
        return float(numpy.linalg.norm(ours - theirs) / numpy.linalg.norm(theirs))


def picked(change: Array) -> Array:
    """Some rows and columns of ΔW [d_model, d_ff], as one vector."""
    return numpy.concatenate([change[list(ROWS)].ravel(), change[:, list(COLUMNS)].ravel()])


def read_full(folder: Path, method: str) -> Golden:
    """The numbers in the full files of `folder`."""
    with numpy.load(folder / f"{method}.npz") as file:
        arrays = dict(file)
    about = json.loads(bytes(arrays["about"]))
    layers = about["layers"]
    if method == "rome":
        numbers = range(len(about["facts"]))
        changes = {(i, layers[0]): numpy.outer(arrays[f"v.{i}"], arrays[f"u.{i}"].astype(float)) for i in numbers}
    elif method == "memit":
        changes = {(0, layer): arrays[f"resid.{layer}"] @ arrays[f"adj_k.{layer}"].T for layer in layers}
    else:
        batches = range(len(about["facts"]) // BATCH)
        changes = {(batch, layer): arrays[f"delta.{batch}.{layer}"].T for batch in batches for layer in layers}
    with numpy.load(folder / ("rome.npz" if method == "rome" else "memit.npz")) as file:
        moments = {layer: file[f"moment.{layer}"] for layer in layers}
    return _golden(about, changes, picked=False, moments=moments)


def read_fixture(method: str) -> Golden:
    """The numbers in the fixture."""
    with numpy.load(FIXTURE) as file:
        about = json.loads(bytes(file[f"{method}.about"]))
        names = [name for name in file.files if name.startswith(method) and not name.endswith("about")]
        changes = {(int(name.split(".")[1]), int(name.split(".")[2])): file[name] for name in names}
    return _golden(about, changes, picked=True, moments=None)


def _golden(about: dict[str, Any], changes: dict[tuple[int, int], Array], **how: Any) -> Golden:
    facts, losses = tuple(Fact(*fact) for fact in about["facts"]), tuple(about["losses"])
    contexts, layers = tuple(about["contexts"]), tuple(about["layers"])
    how |= {"hyperparameters": about["hyperparameters"], "ridge": about["ridge"]}
    return Golden(about["method"], facts, contexts, layers, losses=losses, changes=changes, **how)


def settings_of(golden: Golden) -> dict[str, Any]:
    """The method's settings, from the authors' names to ours."""
    given = golden.hyperparameters
    found: dict[str, Any] = {
        "steps": int(given["v_num_grad_steps"]),
        "lr": given["v_lr"],
        "weight_decay": given["v_weight_decay"],
        "kl_factor": given["kl_factor"],
        "clamp": given["clamp_norm_factor"],
    }
    found |= {"layer": golden.layers[0]} if golden.method == "rome" else {"layers": list(golden.layers)}
    ours = {"mom2_update_weight": "mom2_update_weight", "L2": "l2", "fraction": "fraction"}
    return found | {name: given[theirs] for theirs, name in ours.items() if theirs in given}


def moments_of(lm: LanguageModel, golden: Golden) -> Any:
    """Second moments of the unedited `lm`, for every batch. The golden ones have their ridge already."""
    if golden.moments is None:
        settings = MomentSettings(ridge=golden.ridge)
        return Collected(second_moments(lm, golden.layers, settings, progress=False), settings)
    found = {
        layer: SecondMoment(lm.architecture.down(layer), torch.from_numpy(c).double(), 1, "golden")
        for layer, c in golden.moments.items()
    }
    return Collected(found, MomentSettings(ridge=0.0))


@dataclass(frozen=True)
class Ours:
    """What our code gives: ΔW [d_model, d_ff] by (fact or batch, block), and the losses of every step."""

    changes: dict[tuple[int, int], Array]
    losses: list[float]


def computed(lm: LanguageModel, golden: Golden, **options: Any) -> Ours:
    """Our edits of the golden facts: one a fact (rome), of all (memit), of batches on top of each other (alphaedit)."""
    method = get_method(golden.method)
    settings = method.settings(**settings_of(golden), **options)
    given: dict[str, Any] = {"moments": moments_of(lm, golden), "contexts": list(golden.contexts), "progress": False}

    def edit_of(facts: Sequence[Fact], **more: Any) -> Edit:
        return method(lm, list(facts), settings, **given, **more)

    if golden.method == "rome":
        edits = [edit_of([fact]) for fact in golden.facts]
    elif golden.method == "memit":
        edits = [edit_of(golden.facts)]
    else:
        first = edit_of(golden.facts[:BATCH])
        with first.applied(lm):
            edits = [first, edit_of(golden.facts[BATCH:], earlier=[first])]
    changes = {
        (number, layer): delta.change().numpy()
        for number, edit in enumerate(edits)
        for layer, delta in zip(golden.layers, edit.deltas, strict=True)
    }
    reports = [report for edit in edits for report in edit.provenance["reports"]]
    return Ours(changes, [step["loss"] for report in reports for step in report["steps"]])


def write_fixture(folder: Path) -> None:
    """Make the fixture from the full files: of ROME two facts' ΔW, of the others every block and batch."""
    kept: dict[str, Array] = {}
    for method in METHODS:
        golden = read_full(folder, method)
        with numpy.load(folder / f"{method}.npz") as file:
            kept[f"{method}.about"] = file["about"]
        for (number, layer), change in golden.changes.items():
            if method != "rome" or number < 2:
                kept[f"{method}.{number}.{layer}"] = picked(change).astype(numpy.float32)
    numpy.savez_compressed(FIXTURE, **kept)  # type: ignore[arg-type]  # numpy's stub takes them for its own options


if __name__ == "__main__":
    write_fixture(Path(sys.argv[1]))
