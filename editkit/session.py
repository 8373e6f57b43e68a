"""Session: edits over time on one model, each computed on what the earlier ones left, each of which can be undone.

With W0 the weights at the session's begin and Δ_j the edits that are in force, in the order they were made,

    W = cast(T(W0, Σ_j Δ_j))          summed in float64, cast once; T is a transform (prune, rect, sphere) or nothing

so undoing any step leaves, bit for bit, the composition of the others. What methods carry from step to step (keys of
earlier facts, running statistics) is computed from the steps' `memory`, in their order (shared/carried.py): it is saved
with the steps, and undone with them. Second moments and contexts are taken once, on W0. Nothing is global.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editkit.edits.delta import joined
from editkit.edits.edit import Edit, base_of
from editkit.errors import ConfigError, EditFileError, EditkitError
from editkit.facts import Fact
from editkit.files import write_bytes, write_text
from editkit.methods import get_method
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.prelude import Moments
from editkit.methods.shared.simie import simulated
from editkit.methods.shared.transforms import TRANSFORMS
from editkit.models.architecture import as_stored
from editkit.models.installed import Installed, install, installed_on
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of, write_values
from editkit.models.quantized import edited_module, is_quantized
from editkit.models.snapshot import Reversal, Snapshot, uninterrupted
from editkit.models.wrapped import require_editable
from editkit.nethook import get_module, replace_module
from editkit.settings import ContextSettings, MethodSettings
from editkit.tensorfiles import SEAL, FileKind, contents_digest, explained, require_fields, strict_json

FILE = "session.json"
SESSION_FILE = FileKind(
    format="editkit-session/1",
    noun="a session",
    fields={
        "format": (str,),
        "base": (dict,),
        "method": (str,),
        "settings": (dict,),
        "transform": (str, type(None)),
        "seed": (int,),
        "steps": (list,),
    },
    remedy="Copy the folder again, or begin a new session.",
    origin="Sessions are written by session.save(folder).",
    renew="Session.load(folder, lm).save(folder)",
)


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
    - `transform`: "prune", "rect" or "sphere", of the sum of all steps against the base; None takes the settings' own.
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
        self._modules: dict[str, nn.Module] = {}  # that hold the quantised ones among them at W0
        self._summed: tuple[list[Edit], dict[str, Tensor]] = [], {}  # the last sums: one step more adds to them
        self._saved: set[Path] = set()  # files of steps that are known to be sound
        self._moments = moments
        self._carried = Carried()
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
        return (changed / began) ** 0.5 if began else 0.0

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
            self._save_step(step, folder / name)
        header = {
            "format": SESSION_FILE.format,
            "base": asdict(self.base),
            "method": self.method,
            "settings": asdict(self.settings),
            "transform": self.transform,
            "seed": self.seed,
            "steps": [{"file": name, "digest": step.digest} for name, step in zip(names, self.steps, strict=True)],
        }
        header[SEAL] = contents_digest(header)
        return write_text(folder / FILE, json.dumps(header, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(
        cls, folder: str | Path, lm: LanguageModel, *, moments: Moments = None, progress: bool = True
    ) -> "Session":
        """Go on with a saved session on its base: the same steps, weights and state, bit for bit.

        Raises EditFileError for a folder that holds no session or a damaged one, EditkitError for another base.
        """
        # 1) session.json and the settings in it
        path = Path(folder) / FILE
        header = _read(path)
        with explained(path, SESSION_FILE):
            settings = _settings_of(header)
            listed = [_step_of(step) for step in header["steps"]]
        if header["base"]["digest"] != (found := lm.digest):
            raise EditkitError(
                f"This session began on '{header['base']['name']}' with digest {header['base']['digest'][:12]}; "
                f"'{lm.name}' is {found[:12]}. Load the base it was made for."
            )
        # 2) the steps, each of which must be the one that session.json names
        steps = []
        for name, digest in listed:
            step = Edit.load(path.parent / name, note=False)
            if step.digest != digest:
                raise EditFileError(
                    f"'{path.parent / name}' is not the step that '{path}' names: it holds edit {step.digest[:12]}, "
                    f"and {digest[:12]} is wanted. The file was exchanged or damaged. {SESSION_FILE.remedy}"
                )
            steps.append(step)
        # 3) the session with them in force
        session = cls(
            lm,
            header["method"],
            settings,
            moments=moments,
            transform=header["transform"],
            seed=header["seed"],
            progress=progress,
        )
        session._write(steps)
        session.steps = steps
        return session

    # --- inside -----------------------------------------------------------------------------------------------

    def _save_step(self, step: Edit, path: Path) -> None:
        """Write a step, unless its file is there and has the same bytes. Steps are many: each is compared once."""
        if path in self._saved and path.exists():
            return
        data = step.to_bytes()
        if not (path.is_file() and path.read_bytes() == data):
            write_bytes(path, data)
        self._saved.add(path)

    def _compute(self, facts: Fact | Sequence[Fact], earlier: Sequence[Edit]) -> Edit:
        options = {"seed": self.seed, "progress": self.progress, "earlier": earlier}
        options |= {"carried": self._carried, **self._of_base()}
        step = self._registered(self.lm, facts, self.settings, **options)
        if self.settings.simie is not None:
            step = simulated(step, earlier, self._carried, self.settings.simie)
        return replace(step, parents=tuple(edit.digest for edit in earlier))

    def _of_base(self) -> dict[str, Any]:
        """Second moments, contexts and what else the method asks of W0, taken the first time they are needed."""
        if self._inputs is None:
            with self._undone_if_it_fails(always=True):
                self._write([])
                shared = self._registered.shared(self.lm, self.settings, self._moments, self.seed, self.progress)
                self._inputs = shared
        return self._inputs

    def _total(self, steps: Sequence[Edit]) -> Edit:
        """With the base's weights in the model where a transform looks at them."""
        deltas = joined(delta for step in steps for delta in step.deltas)
        how = {"method": "session", "steps": [step.provenance for step in steps]}
        one = Edit(deltas, self.base, how, installed=tuple(each for step in steps for each in step.installed))
        if self.transform is None or not steps:
            return one
        with self._undone_if_it_fails(always=True):
            self._copy({**self._held, **self._modules})
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
        """Bring the weights to W0 and `steps`, those of parameters without a step back to W0, and put on the model what
        the steps install."""
        stored = {delta.parameter: delta for step in steps for delta in step.deltas}
        for name in stored:
            if name not in self._held:  # no step has touched it: it is W0
                module = get_module(self.lm.model, stored[name].module)
                if is_quantized(module):
                    self._modules[name] = module
                self._held[name] = values_of(self.lm.model, name).clone()
        for name in self._held:
            require_editable(self.lm.model, name.rpartition(".")[0])
        sums: dict[str, Tensor] = self._sums(steps)
        values: dict[str, Tensor | nn.Module] = {**self._held, **self._modules}
        for name, total in sums.items():
            start = self._held[name]
            change = as_stored(total, stored[name].orientation, stored[name].experts)
            changed = start.double() + change.to(start.device)
            if not changed.to(start.dtype).isfinite().all():
                raise EditkitError(f"{name} is not finite in {start.dtype} with this step; the step was not taken.")
            if name in self._modules:
                module, way, site = self._modules[name], self.lm.edited, stored[name].module
                values[name] = edited_module(module, total.float(), None, way, self.lm.dtype, site)
            else:
                values[name] = changed.to(start.dtype)
        self._copy(values, [*self._start.installed, *(each for step in steps for each in step.installed)])

    def _copy(self, values: Mapping[str, Tensor | nn.Module], contents: Sequence[Installed] | None = None) -> None:
        """Give the parameters these values; a quantised one is given its module, or what takes that one's place. With
        `contents`, they are all that is in force besides weights."""
        with uninterrupted():
            if contents is not None:
                install(self.lm.model, contents)
            for name, value in values.items():
                if isinstance(value, nn.Module):
                    replace_module(self.lm.model, name.rpartition(".")[0], value)
                else:
                    write_values(self.lm.model, name, value)

    def _now(self, name: str) -> Tensor | nn.Module:
        """What `_copy` takes to leave the parameter as it is now."""
        if name in self._modules:
            return get_module(self.lm.model, name.rpartition(".")[0])
        return values_of(self.lm.model, name).clone()

    @contextlib.contextmanager
    def _undone_if_it_fails(self, *, always: bool = False) -> Iterator[None]:
        """Weights and steps as they were, after an exception in the body (`always`: after the body)."""
        steps = self.steps
        now, on = {name: self._now(name) for name in self._held}, installed_on(self.lm.model)
        try:
            yield
        except BaseException:
            self.steps = steps
            self._copy({**self._held, **self._modules, **now}, on)
            raise
        if always:
            self._copy({**self._held, **self._modules, **now}, on)


def _read(path: Path) -> dict[str, Any]:
    """The JSON of a session's file, checked. Raises EditFileError; warns of one without a digest."""
    with explained(path, SESSION_FILE):
        header = strict_json(path.read_bytes())
        if isinstance(header, dict) and header.get("format", SESSION_FILE.format) != SESSION_FILE.format:
            raise ValueError(f"its format is {header['format']!r}, and {SESSION_FILE.format!r} is read here")
        stored = header.pop(SEAL, None) if isinstance(header, dict) else None
        if stored is not None and stored != contents_digest(header):
            raise ValueError("its contents do not have the digest that was stored with them")
        require_fields(header, SESSION_FILE.fields, "its content")
        require_fields(header["base"], dict.fromkeys(("name", "digest", "dtype"), (str,)), "its base")
    if stored is None:
        warnings.warn(
            f"'{path}' was written without a digest, so damage would not be noticed. To write it anew with one: "
            f"{SESSION_FILE.renew}.",
            stacklevel=3,
        )
    return dict(header)


def _settings_of(header: dict[str, Any]) -> MethodSettings:
    """The settings in a session's file. Raises ValueError or TypeError where they are not those of its method."""
    try:
        kind = get_method(header["method"]).settings
        values = dict(header["settings"])
        if "contexts" in values:
            values["contexts"] = ContextSettings(**values["contexts"])
        if header["transform"] not in (None, *TRANSFORMS):
            raise ValueError(f"its transform is {header['transform']!r}")
        return kind(**values)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _step_of(step: object) -> tuple[str, str]:
    """(file name, digest) of a step in a session's file. Raises ValueError for a name that is not one of ours."""
    found = require_fields(step, {"file": (str,), "digest": (str,)}, "a step")
    if found["file"] != f"{found['digest'][:16]}.safetensors" or "/" in found["file"]:
        raise ValueError(f"the file of a step is {found['file'][:80]!r}")
    return found["file"], found["digest"]


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    zero = torch.zeros(())
    apart = sum((a.get(n, zero) - b.get(n, zero)).square().sum().item() for n in {*a, *b})
    size = sum(t.square().sum().item() for t in b.values())
    return (apart / size) ** 0.5 if size else 0.0
