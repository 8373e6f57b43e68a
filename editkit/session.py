"""Session: edits over time on one model, each computed on what the earlier ones left, each of which can be undone.

The weights are those of the session's begin and the sum of the steps in force, in their order (composition.py), so
undoing any step leaves, bit for bit, the composition of the others. What methods carry from step to step (keys of
earlier facts, running statistics) is computed from the steps' `memory`, in their order (shared/carried.py): it is saved
with the steps (sessionfiles.py), and undone with them. Second moments and contexts are taken once, on the weights of
the begin. Nothing is global.

With `keep=k` the latest k steps are kept, and older ones are folded into one sum (folded.py): the weights are the same
bit for bit, and a step takes as much time and memory after 10,000 steps as after 100. A folded step cannot be undone.

An alarm looks at the model on the way (alarm.py), and may end the session or take it back to its last good step.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editkit.alarm import CONTINUE, ROLLBACK, Alarm, CollapseError, Seen
from editkit.composition import Composition, distance
from editkit.edits.base import base_of
from editkit.edits.edit import Edit
from editkit.errors import ConfigError, EditkitError
from editkit.facts import Fact
from editkit.folded import Folded, facts_in
from editkit.methods import get_method
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.prelude import Moments
from editkit.methods.shared.simie import simulated
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Reversal, Snapshot
from editkit.sessionfiles import Folder, Header, read_session
from editkit.settings import MethodSettings
from editkit.shown import Rows, Shown, counted


@dataclass(frozen=True)
class Undone:
    """What `Session.undo` took back, and what that means for the steps made after it."""

    edit: Edit
    later: tuple[int, ...]  # steps, as numbered now, that were computed while it was in force
    distance: float | None = None  # ‖Σ Δ − Σ Δ re-run without it‖ / ‖Σ Δ re-run‖, where a re-run was asked for


STEPS_SHOWN = 5  # of a session in a notebook


@dataclass(frozen=True)
class State:
    """Which steps are in force, and what their method carries."""

    folded: Folded
    steps: list[Edit]
    carried: Carried

    @property
    def count(self) -> int:
        """Of all steps, the folded ones too."""
        return self.folded.steps + len(self.steps)


class Session(Shown):
    """Edits over time. `with Session(lm, "alphaedit") as session: session.edit(facts)`; restored and verified on exit.

    - `method`, `settings`: a registered name, and its settings (defaults where None).
    - `moments`: how to collect C on the base, or {layer: SecondMoment}.
    - `transform`: "prune", "rect" or "sphere", of the sum of all steps against the base; None takes the settings' own.
    - `seed`: of contexts and running text.
    - `keep`: how many of the latest steps can be undone, the others are folded; None: all.
    - `alarm`: looks at the model after steps; see `Alarm`.

    `steps` are the edits in force, without the `folded` ones. Raises ConfigError for an unknown method, and for one
    whose state cannot be folded where `keep` is given.
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
        keep: int | None = None,
        alarm: Alarm | None = None,
    ) -> None:
        registered = get_method(method)
        if keep is not None and keep < 1:
            raise ConfigError(f"keep={keep} was asked for: keep one step or more, or leave it out to keep all.")
        if keep is not None and "earlier" in registered.takes and "carried" not in registered.takes:
            raise ConfigError(
                f"method={method} looks at all earlier edits itself, so they cannot be folded. Leave out keep "
                "(task.keep=null), or let the method use `carried` (methods/shared/carried.py)."
            )
        self.lm, self.method, self.seed, self.progress, self.keep, self.alarm = lm, method, seed, progress, keep, alarm
        self._registered = registered
        given = settings or registered.settings()
        self.transform = transform or given.transform
        self.settings = replace(given.resolved(lm.name, lm.layers), transform=None)
        self.base = base_of(lm)
        self.folded, self.steps, self._carried = Folded(), list[Edit](), Carried()
        self._start = Snapshot.take(lm.model, [])  # digests of everything, to verify by at the end
        self._weights = Composition(lm, self.base, self.transform)
        self._moments = moments
        self._inputs: dict[str, Any] | None = None
        self._folder: Folder | None = None
        self._good = self._state()  # at the last look that passed no limit
        self._since: list[Fact] = []  # facts edited since that look
        self._seen: Seen | None = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        reversal = self.reset()
        if kind is None:
            reversal.require()

    def shown(self) -> tuple[str, Rows]:
        """Its method, model, and the steps in force: the latest few."""
        folded = [("folded", counted(self.folded.steps, "step"))] if self.folded.steps else []
        rows = [("model", self.lm.name), ("in force", counted(self.count, "step")), *folded]
        first = max(0, len(self.steps) - STEPS_SHOWN)
        for number, step in enumerate(self.steps[first:], first):
            facts = step.provenance.get("facts", [])
            said = f"{facts[0]['subject']} → {facts[0]['target_new']}" if facts else "no fact named"
            rows.append((f"step {number}", said + (f", and {len(facts) - 1:,} more" if len(facts) > 1 else "")))
        return f"Session of {self.method}", rows

    @property
    def count(self) -> int:
        """How many steps are in force, the folded ones too."""
        return self._state().count

    @property
    def good(self) -> int:
        """How many steps were in force at the last look that passed no limit; 0 before the first."""
        return self._good.count

    def edit(self, facts: Fact | Sequence[Fact]) -> Edit:
        """Compute an edit of `facts` on the model as it is now, and put it in force.

        An exception or Ctrl-C leaves the session and the weights as they were before. Only CollapseError, which an
        alarm raises, comes after the step has been taken: the session is then as its message says.
        """
        step = self._compute(facts, self.steps)
        with self._undone_if_it_fails():
            self._weights.write(self.folded, [*self.steps, step])
            self.steps = [*self.steps, step]
            while self.keep is not None and len(self.steps) > self.keep:
                self._fold()
        if self.alarm is not None:
            self._since += [facts] if isinstance(facts, Fact) else facts
            if self.alarm.due(self.count):
                self.look()
        return step

    def look(self) -> Seen | None:
        """What the alarm sees now; None without one. At a limit it does what `Alarm.on_collapse` says.

        Raises CollapseError, with the step kept (stop), or with the session back at its last good step (rollback).
        """
        if self.alarm is None:
            return None
        number, folded = self.count, self.folded
        if self._seen is not None and self._seen.step == number:
            return self._seen
        edited = folded.facts + sum(map(facts_in, self.steps))
        seen = self._seen = self.alarm.look(number, edited, self._weights.norms(folded, self.steps))
        if not seen.passed:
            self._good, self._since = self._state(), []
            return seen
        if self.alarm.on_collapse == CONTINUE:
            return seen
        dropped = self._since if self.alarm.on_collapse == ROLLBACK else []
        if self.alarm.on_collapse == ROLLBACK:
            self._return_to(self._good)
        raise CollapseError(seen, self.count, dropped)

    def undo(self, number: int, *, rerun: bool = False) -> Undone:
        """Take back step `number` of `steps`: the weights become those of the other steps, bit for bit.

        Later steps stay as they are, though they were computed on top of it; `rerun` computes them again without it,
        changes nothing by that, and tells how far the two are apart. Raises EditkitError for a step there is not.
        """
        if not -len(self.steps) <= number < len(self.steps):
            folded = f" and {self.folded.steps} that are folded" if self.folded.steps else ""
            raise EditkitError(f"Step {number} was to be undone; the session has {len(self.steps)}{folded}.")
        number %= len(self.steps)
        rest = [*self.steps[:number], *self.steps[number + 1 :]]
        with self._undone_if_it_fails():
            again = list(self.steps[:number])
            if rerun:
                for later in self.steps[number + 1 :]:
                    self._weights.write(self.folded, again)
                    again.append(self._compute([Fact(**fact) for fact in later.provenance["facts"]], again))
            self._weights.write(self.folded, rest)
            gone, self.steps = self.steps[number], rest
        self._seen = None
        sums = self._weights.sums
        apart = distance(sums(self.folded, rest), sums(self.folded, again)) if rerun else None
        return Undone(gone, tuple(range(number, len(rest))), apart)

    def total(self) -> Edit:
        """The sum of all steps as one edit of the base, transformed where the session transforms."""
        return self._weights.total(self.folded, self.steps)

    def relative_norm(self) -> float:
        """‖Σ ΔW‖ / ‖W0‖ (Frobenius) over the parameters that the steps change; 0 without steps."""
        norms = self._weights.norms(self.folded, self.steps).values()
        changed, began = (sum(size**2 for size in sizes) for sizes in zip(*norms, strict=True)) if norms else (0, 0)
        return (changed / began) ** 0.5 if began else 0.0

    @contextlib.contextmanager
    def unedited(self) -> Iterator[None]:
        """The weights of the session's begin in the body, those of its steps after it."""
        with self._weights.unchanged():
            self._weights.write(Folded(), [])
            yield

    def reset(self) -> Reversal:
        """Take back everything: the weights of the session's begin, compared bit for bit with them."""
        self._return_to(State(Folded(), [], Carried()))
        self._good, self._since = self._state(), []
        return self._start.verify()

    def save(self, folder: str | Path) -> Path:
        """Write the steps, the folded sum and session.json, which is written last: without it a folder is no session.

        Raises OutputError, and EditkitError for a method that carries what cannot be saved.
        """
        if self._folder is None or self._folder.path != Path(folder):
            self._folder = Folder(Path(folder))
        header = Header(self.base, self.method, self.settings, self.transform, self.seed, self.keep)
        return self._folder.save(header, self.folded, self._carried, self.steps)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        lm: LanguageModel,
        *,
        moments: Moments = None,
        progress: bool = True,
        alarm: Alarm | None = None,
    ) -> "Session":
        """Go on with a saved session on its base: the same steps, weights and state, bit for bit.

        Raises EditFileError for a folder that holds no session or a damaged one, EditkitError for another base.
        """
        found = read_session(Path(folder), lm)
        how = found.header
        session = cls(
            lm,
            how.method,
            how.settings,
            moments=moments,
            transform=how.transform,
            seed=how.seed,
            progress=progress,
            keep=how.keep,
            alarm=alarm,
        )
        session._return_to(State(found.folded, found.steps, found.carried))
        session._good = session._state()
        return session

    # --- inside -----------------------------------------------------------------------------------------------

    def _state(self) -> State:
        return State(self.folded, self.steps, self._carried)

    def _return_to(self, state: State) -> None:
        """Put these steps in force, and no others."""
        self._weights.write(state.folded, state.steps)
        self.folded, self.steps, self._carried = state.folded, list(state.steps), state.carried.copy()
        self._since, self._seen = [], None

    def _fold(self) -> None:
        """Fold the oldest step. The weights stay as they are: the sum is the same."""
        oldest, *rest = self.steps
        folded, carried = self.folded.plus(oldest), self._carried.fold(oldest)
        self._weights.folds(folded, rest)
        self.folded, self.steps, self._carried = folded, rest, carried

    def _compute(self, facts: Fact | Sequence[Fact], earlier: Sequence[Edit]) -> Edit:
        options = {"seed": self.seed, "progress": self.progress, "earlier": earlier}
        options |= {"carried": self._carried, **self._of_base()}
        step = self._registered(self.lm, facts, self.settings, **options)
        if self.keep is not None and step.installed:
            raise ConfigError(
                f"method={self.method} installs {step.installed[0]}, which cannot be folded into a sum of weights. "
                "Leave out keep (task.keep=null)."
            )
        if self.settings.simie is not None:
            step = simulated(step, earlier, self._carried, self.settings.simie)
        return replace(step, parents=(*self.folded.parents, *(edit.digest for edit in earlier)))

    def _of_base(self) -> dict[str, Any]:
        """Second moments, contexts and what else the method asks of W0, taken the first time they are needed."""
        if self._inputs is None:
            with self.unedited():
                shared = self._registered.shared(self.lm, self.settings, self._moments, self.seed, self.progress)
                self._inputs = shared
        return self._inputs

    @contextlib.contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """Weights and steps as they were, after an exception in the body."""
        before = self._state()
        with self._weights.unchanged(if_it_fails=True):
            try:
                yield
            except BaseException:
                self.folded, self.steps, self._carried = before.folded, before.steps, before.carried
                raise
