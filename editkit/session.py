"""Session: edits over time on one model, each computed on what the earlier ones left, each of which can be undone.

With W0 the weights at the session's begin and Δ_j the edits that are in force, in the order they were made,

    W = cast(T(W0, Σ_j Δ_j))          summed in float64, cast once; T is a transform (prune, rect) or nothing

so undoing any step leaves, bit for bit, the composition of the others. What methods carry from step to step
(AlphaEdit's keys) lies in the steps' `memory`; second moments and contexts are taken once, on W0. Nothing is global.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editkit.edits.arithmetic import joined
from editkit.edits.edit import Edit, base_of
from editkit.errors import EditFileError, EditkitError
from editkit.facts import Fact
from editkit.files import write_text
from editkit.methods import get_method
from editkit.methods.shared.prelude import Moments, shared_inputs
from editkit.methods.shared.transforms import TRANSFORMS
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Reversal, Snapshot, uninterrupted
from editkit.nethook import get_parameter
from editkit.settings import MethodSettings

FORMAT = "editkit-session/1"
FILE = "session.json"


@dataclass(frozen=True)
class Undone:
    """What `Session.undo` took back, and what that means for the steps made after it."""

    edit: Edit
    later: tuple[int, ...]  # steps, as numbered now, that were computed while it was in force
    distance: float | None = None  # ‖Σ Δ − Σ Δ re-run without it‖ / ‖Σ Δ re-run‖, where a re-run was asked for


class Session:
    """Edits over time. `with Session(lm, "alphaedit") as session: session.edit(facts)`; restored and verified on exit.

    - `method`, `settings`: a registered name, and its settings (defaults where None).
    - `moments`: how to collect C on the base, or {layer: SecondMoment}.
    - `transform`: "prune" or "rect", of the sum of all steps against the base; None takes the settings' own.
    - `seed`: of contexts and running text.

    `steps` are the edits in force. Raises ConfigError for an unknown method.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: str = "r_rome",
        settings: MethodSettings | None = None,
        *,
        moments: Moments = None,
        transform: str | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        registered = get_method(method)
        self.lm, self.method, self.seed, self.progress = lm, method, seed, progress
        self._registered = registered
        given = settings or registered.settings()
        self.transform = transform or given.transform
        self.settings = replace(given.resolved(lm.name, lm.layers), transform=None)
        self.base = base_of(lm)
        self.steps: list[Edit] = []
        self._start = Snapshot.take(lm.model, [])  # digests of everything, to verify by at the end
        self._held: dict[str, Tensor] = {}  # W0 of every parameter that a step has changed
        self._summed: tuple[list[Edit], dict[str, Tensor]] = [], {}  # the last sums: one step more adds to them
        self._moments = moments
        self._inputs: dict[str, Any] | None = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        reversal = self.reset()
        if kind is None:
            reversal.require()

    def edit(self, facts: Fact | Sequence[Fact]) -> Edit:
        """Compute an edit of `facts` on the model as it is now, and put it in force.

        An exception or Ctrl-C leaves the session and the weights as they were before.
        """
        step = self._compute(facts, self.steps)
        with self._undone_if_it_fails():
            self._write([*self.steps, step])
            self.steps = [*self.steps, step]
        return step

    def undo(self, number: int, *, rerun: bool = False) -> Undone:
        """Take back step `number`: the weights become those of the other steps, bit for bit.

        Later steps stay as they are, though they were computed on top of it; `rerun` computes them again without it,
        changes nothing by that, and tells how far the two are apart. Raises EditkitError for a step there is not.
        """
        if not -len(self.steps) <= number < len(self.steps):
            raise EditkitError(f"Step {number} was to be undone; the session has {len(self.steps)}.")
        number %= len(self.steps)
        rest = [*self.steps[:number], *self.steps[number + 1 :]]
        with self._undone_if_it_fails():
            again = list(self.steps[:number])
            if rerun:
                for later in self.steps[number + 1 :]:
                    self._write(again)
                    again.append(self._compute([Fact(**fact) for fact in later.provenance["facts"]], again))
            self._write(rest)
            gone, self.steps = self.steps[number], rest
        distance = _distance(self._sums(rest), self._sums(again)) if rerun else None
        return Undone(gone, tuple(range(number, len(rest))), distance)

    def total(self) -> Edit:
        """The sum of all steps as one edit of the base, transformed where the session transforms."""
        return self._total(self.steps)

    def relative_norm(self) -> float:
        """‖Σ ΔW‖ / ‖W0‖ (Frobenius) over the parameters that the steps change; 0 without steps."""
        changed = sum(change.square().sum().item() for change in self._sums(self.steps).values())
        began = sum(start.double().square().sum().item() for start in self._held.values())
        return (changed / began) ** 0.5 if self.steps else 0.0

    def reset(self) -> Reversal:
        """Take back everything: the weights of the session's begin, compared bit for bit with them."""
        self._write([])
        self.steps = []
        return self._start.verify()

    def save(self, folder: str | Path) -> Path:
        """Write the steps and session.json, which is written last: without it a folder is no session."""
        folder = Path(folder)
        names = [f"{step.digest[:16]}.safetensors" for step in self.steps]
        for step, name in zip(self.steps, names, strict=True):
            if not (folder / name).exists():  # a name is the digest of the bytes
                step.save(folder / name)
        header = {
            "format": FORMAT,
            "base": asdict(self.base),
            "method": self.method,
            "settings": asdict(self.settings),
            "transform": self.transform,
            "seed": self.seed,
            "steps": [{"file": name, "digest": step.digest} for name, step in zip(names, self.steps, strict=True)],
        }
        return write_text(folder / FILE, json.dumps(header, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(
        cls, folder: str | Path, lm: LanguageModel, *, moments: Moments = None, progress: bool = True
    ) -> "Session":
        """Go on with a saved session on its base: the same steps, weights and state, bit for bit.

        Raises EditFileError for a folder that holds no session or a damaged one, EditkitError for another base.
        """
        path = Path(folder) / FILE
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}, and {FORMAT!r} is read here")
            values = dict(header["settings"])
            if "contexts" in values:
                values["contexts"] = type(get_method(header["method"]).settings().contexts)(**values["contexts"])  # type: ignore[attr-defined]
            settings = get_method(header["method"]).settings(**values)
            listed = [(step["file"], step["digest"]) for step in header["steps"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EditFileError(f"'{path}' cannot be read as a session: {error}.") from error
        if header["base"]["digest"] != (found := lm.digest):
            raise EditkitError(
                f"This session began on '{header['base']['name']}' with digest {header['base']['digest'][:12]}; "
                f"'{lm.name}' is {found[:12]}. Load the base it was made for."
            )
        session = cls(
            lm,
            header["method"],
            settings,
            moments=moments,
            transform=header["transform"],
            seed=header["seed"],
            progress=progress,
        )
        steps = []
        for name, digest in listed:
            step = Edit.load(Path(folder) / name)
            if step.digest != digest:
                raise EditFileError(f"'{Path(folder) / name}' is not the step that the session names; it was replaced.")
            steps.append(step)
        session._write(steps)
        session.steps = steps
        return session

    # --- inside -----------------------------------------------------------------------------------------------

    def _compute(self, facts: Fact | Sequence[Fact], earlier: Sequence[Edit]) -> Edit:
        options = {"seed": self.seed, "progress": self.progress, "earlier": earlier, **self._of_base()}
        step = self._registered(self.lm, facts, self.settings, **options)
        return replace(step, parents=tuple(edit.digest for edit in earlier))

    def _of_base(self) -> dict[str, Any]:
        """Second moments and contexts of W0, taken the first time they are needed."""
        if self._inputs is None:
            with self._undone_if_it_fails(always=True):
                self._write([])
                shared = shared_inputs(self.lm, self.settings, self._moments, self.seed, self.progress)
                self._inputs = {"moments": self._moments, **shared}
        return self._inputs

    def _total(self, steps: Sequence[Edit]) -> Edit:
        """With the base's weights in the model where a transform looks at them."""
        deltas = joined(delta for step in steps for delta in step.deltas)
        one = Edit(deltas, self.base, {"method": "session", "steps": [step.provenance for step in steps]})
        if self.transform is None or not steps:
            return one
        with self._undone_if_it_fails(always=True):
            self._copy(self._held)
            return TRANSFORMS[self.transform](self.lm, one)

    def _sums(self, steps: Sequence[Edit]) -> dict[str, Tensor]:
        """Σ ΔW of each parameter, [d_model, d_ff] in float64."""
        steps = [self._total(steps)] if self.transform else list(steps)
        summed, known = self._summed
        same = len(summed) <= len(steps) and all(a is b for a, b in zip(summed, steps, strict=False))
        summed, sums = (summed, dict(known)) if same else ([], {})
        for step in steps[len(summed) :]:
            for delta in step.deltas:
                change = delta.change()
                sums[delta.parameter] = sums[delta.parameter] + change if delta.parameter in sums else change
        self._summed = steps, sums
        return sums

    def _write(self, steps: Sequence[Edit]) -> None:
        """Bring the weights to W0 and `steps`, and those of parameters without a step back to W0."""
        stored = {delta.parameter: delta.orientation for step in steps for delta in step.deltas}
        for name in stored:
            if name not in self._held:  # no step has touched it: it is W0
                self._held[name] = get_parameter(self.lm.model, name).detach().clone()
        sums, values = self._sums(steps), dict(self._held)
        for name, total in sums.items():
            start = self._held[name]
            changed = start.double() + (total.T if stored[name] == "in_out" else total).to(start.device)
            if not changed.to(start.dtype).isfinite().all():
                raise EditkitError(f"{name} is not finite in {start.dtype} with this step; the step was not taken.")
            values[name] = changed.to(start.dtype)
        self._copy(values)

    def _copy(self, values: dict[str, Tensor]) -> None:
        with uninterrupted(), torch.no_grad():
            for name, value in values.items():
                get_parameter(self.lm.model, name).copy_(value)

    @contextlib.contextmanager
    def _undone_if_it_fails(self, *, always: bool = False) -> Iterator[None]:
        """Weights and steps as they were, after an exception in the body (`always`: after the body)."""
        steps = self.steps
        now = {name: get_parameter(self.lm.model, name).detach().clone() for name in self._held}
        try:
            yield
        except BaseException:
            self.steps = steps
            self._copy(self._held | now)
            raise
        if always:
            self._copy(self._held | now)


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    zero = torch.zeros(())
    apart = sum((a.get(n, zero) - b.get(n, zero)).square().sum().item() for n in {*a, *b})
    size = sum(t.square().sum().item() for t in b.values())
    return (apart / size) ** 0.5 if size else 0.0
