"""Edit: a change of a model as a value. Computing, saving and loading one leaves every model as it is.

An edit holds low-rank factors for each parameter it changes, in the papers' orientation (W: [d_model, d_ff],
ΔW = left @ right), or ΔW itself where it has no low rank, with the digest of the base it was computed for and
how it was computed. Instead of that, or beside it, it holds contents that go on a model without a change of weights: a
prefix, a codebook (models/installed.py). Its file is in editfile.py.

Edits of one base are vectors: they add, scale and are cut to a rank without a model at hand. An edit that was computed
on top of others is put together with them in their order, by `apply_files` or by a Session.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editkit.edits import hub
from editkit.edits.base import QUANTIZED_BASE, Base, base_of
from editkit.edits.delta import Delta, joined, make_delta
from editkit.edits.editfile import Parts, read, written
from editkit.edits.gguf import write_gguf
from editkit.edits.peft import write_adapter
from editkit.edits.writing import edited_digest, require_weight, write_change
from editkit.errors import EditkitError
from editkit.files import write_bytes
from editkit.models.installed import Installed, install
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of
from editkit.models.quantized import is_quantized
from editkit.models.snapshot import Reversal, Snapshot
from editkit.nethook import get_module
from editkit.shown import SHORT, Rows, Shown

FACTS_SHOWN = 5  # of an edit in a notebook
FOLDED = "folded:"  # in front of the parent that stands for the folded steps of a session


@dataclass(frozen=True, eq=False, repr=False)
class Edit(Shown):
    """A frozen edit. `with edit.applied(lm): ...` applies it, and restores and verifies on exit.

    `provenance` is JSON: method, settings, facts, seed, loss of each step, versions. `parents` are digests
    of edits that had been applied to the base before this one was computed, in order; of a session that folds its older
    steps the first is FOLDED and the digest of all of those (editkit/folded.py). `memory` is what the same
    method wants to know of this edit when it edits on top of it (AlphaEdit: the keys), in float32. `installed` are
    contents that change no weight, in the order they go on the model.
    """

    deltas: tuple[Delta, ...]
    base: Base
    provenance: dict[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)
    installed: tuple[Installed, ...] = ()

    def __post_init__(self) -> None:  # as a file gives them back, see Delta
        object.__setattr__(self, "memory", {name: tensor.contiguous() for name, tensor in self.memory.items()})

    def shown(self) -> tuple[str, Rows]:
        """Its method, facts, changes and base; of many facts the first few."""
        how = self.provenance
        stated = how.get("facts", [])
        facts = [f"{fact['prompt'].replace('{}', fact['subject'])} → {fact['target_new']}" for fact in stated]
        more = [f"and {len(facts) - FACTS_SHOWN:,} more"] if len(facts) > FACTS_SHOWN else []
        rows = [("fact" if not i else "", text) for i, text in enumerate([*facts[:FACTS_SHOWN], *more])]
        for delta in self.deltas:
            rank = "dense" if delta.right is None else f"rank {delta.rank}"
            rows.append(("weight", f"{delta.parameter}, {rank}, ‖ΔW‖ {delta.norm():.4g}"))
        rows += [("installs", str(each)) for each in self.installed]
        rows += [("on top of", parent[:SHORT]) for parent in self.parents]
        rows.append(("base", f"{self.base.name}, {self.base.dtype}, digest {self.base.digest[:SHORT]}"))
        return f"Edit by {how.get('method', 'an unknown method')}", rows

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that the edit changes."""
        return [delta.parameter for delta in self.deltas]

    @property
    def rank(self) -> int:
        """The largest rank among the deltas."""
        return max((delta.rank for delta in self.deltas), default=0)

    @property
    def modules(self) -> set[str]:
        """Names of the modules whose outputs the edit changes directly."""
        return {delta.module for delta in self.deltas} | {name for each in self.installed for name in each.modules}

    def require_weights(self, what: str) -> None:
        """Raise EditkitError unless the edit is a change of weights alone. `what` was to be done with it."""
        if self.installed:
            raise EditkitError(
                f"{what} is for changes of weights, and this edit is {', '.join(map(str, self.installed))}. Use "
                "a method that changes weights, as method=r_rome."
            )

    def require_same_tokens(self, what: str) -> None:
        """Raise EditkitError where texts have other tokens with the edit. `what` compares token by token."""
        if moving := [each for each in self.installed if each.moves_tokens]:
            raise EditkitError(
                f"{what} compares a text with and without the edit token by token, and {moving[0]} puts other tokens "
                "in front of it. Compare scores or generated texts."
            )

    def norm(self) -> float:
        """‖Δ‖ over all parameters (Frobenius)."""
        return math.sqrt(sum(delta.norm() ** 2 for delta in self.deltas))

    def __add__(self, other: "Edit") -> "Edit":
        return combined([self, other], [1.0, 1.0])

    def __sub__(self, other: "Edit") -> "Edit":
        return combined([self, other], [1.0, -1.0])

    def __neg__(self) -> "Edit":
        return combined([self], [-1.0])

    def __mul__(self, factor: float) -> "Edit":
        return combined([self], [factor])

    __rmul__ = __mul__

    @functools.cached_property
    def digest(self) -> str:
        """The identity of the edit, as `parents` name it: sha256 of the saved bytes without the file's own digest."""
        return hashlib.sha256(written(self._parts(), seal=False)).hexdigest()

    # --- applying -------------------------------------------------------------------------------------------

    def check_base(self, lm: LanguageModel, *, whole: bool = True) -> None:
        """Raise EditkitError unless `lm` is the base of this edit, bit for bit.

        The weights that the edit changes are always compared; `whole` compares the digest of the whole model.
        """
        for delta in self.deltas:
            found = edited_digest(lm, delta.parameter)
            if found != delta.before:
                raise EditkitError(
                    f"This edit was computed for '{self.base.name}' with {delta.parameter} = {delta.before[:12]}; "
                    f"the weight in '{lm.name}' is {found[:12]}. Load the base it was made for (dtype "
                    f"{self.base.dtype}), and restore other edits first. The same base in another dtype takes "
                    "edit.in_dtype_of(lm)."
                )
        for each in self.installed:
            each.check(lm.model)
        if whole and self.base.digest != (found := lm.digest):
            raise EditkitError(
                f"This edit was computed for '{self.base.name}' with digest {self.base.digest[:12]}; '{lm.name}' is "
                f"{found[:12]}: other weights than the edited ones differ. Load the base it was made for."
            )

    def apply(self, lm: LanguageModel, *, check: bool = True, everything: bool | None = None) -> Snapshot:
        """Write the edit into the model and return the snapshot that undoes it (`restore()`, `verify()`). Its contents
        go on the model behind those that are there.

        W + ΔW is added in float32 (float64 for float64 weights) and cast once to the weight's dtype; a quantised weight
        is not written, but edited by the way `lm.edited` (models/quantized.py). If
        anything fails, the weights are put back before the exception leaves. `check=False` skips
        the comparison with the base; `everything` is that of `Snapshot.take`. Warns of an update larger than its
        weight. Raises EditkitError for another base, a weight that cannot be edited as the model is wrapped
        (models/wrapped.py), or a result that is not finite.
        """
        for name in self.parameters:
            require_weight(lm, name)
        if check:
            self.check_base(lm)
        for each in self.installed:
            each.check(lm.model)
        snapshot = Snapshot.take(lm.model, self.parameters, everything=everything)
        try:
            with torch.no_grad():
                for delta in self.deltas:
                    write_change(lm, delta)
            if self.installed:
                install(lm.model, [*snapshot.installed, *self.installed])
        except BaseException:
            snapshot.restore()
            raise
        return snapshot

    def in_dtype_of(self, lm: LanguageModel) -> "Edit":
        """This edit for `lm`, the same base loaded in another dtype: an edit of float32 weights on bfloat16 ones.

        That the weights are the same but for rounding cannot be read off a digest: whoever calls this vouches for it.
        The former base stays in `provenance["computed_for"]`. Raises EditkitError when the dtypes are equal, or a
        weight has another name, shape or orientation.
        """
        if base_of(lm).dtype == self.base.dtype:
            raise EditkitError(
                f"'{lm.name}' and the base of this edit are both {self.base.dtype}: apply the edit as it is."
            )
        for name in self.parameters:
            edited_digest(lm, name)
        deltas = tuple(make_delta(lm, each.module, each.left, each.right) for each in self.deltas)
        for old, new in zip(self.deltas, deltas, strict=True):
            # A Conv1D that is quantised becomes a Linear: the same W, stored the other way.
            turned = old.orientation != new.orientation and not is_quantized(get_module(lm.model, new.module))
            turned = turned and QUANTIZED_BASE not in self.base.dtype
            if turned or (old.bias, old.experts) != (new.bias, new.experts):
                raise EditkitError(
                    f"{old.module} is stored {old.orientation} with bias={old.bias} in the base of this edit, and "
                    f"{new.orientation} with bias={new.bias} in '{lm.name}': another model, not another dtype."
                )
        how = self.provenance | {"computed_for": asdict(self.base)}
        return replace(self, deltas=deltas, base=base_of(lm), provenance=how)

    @contextlib.contextmanager
    def applied(self, lm: LanguageModel, *, check: bool = True, everything: bool | None = None) -> Iterator["Applied"]:
        """The edited model inside the `with`; the original, restored and verified, after it.

        Restores on every exit, exceptions and Ctrl-C included. The yielded `Applied` holds the reversal
        report once the body has ended. Raises ReversalError if any bit differs.
        """
        snapshot = self.apply(lm, check=check, everything=everything)
        state = Applied(snapshot)
        try:
            yield state
        except BaseException:
            snapshot.restore()
            raise
        snapshot.restore()
        state.reversal = snapshot.verify().require()

    # --- saving ---------------------------------------------------------------------------------------------

    def to_peft(self, folder: str | Path, rank: int | None = None, *, served: bool = False) -> dict[str, float]:
        """Write a LoRA adapter that peft loads onto the untouched base; `served`: vLLM and SGLang too. See
        `peft.write_adapter`.

        Raises EditkitError for an edit that is more than a change of weights.
        """
        self.require_weights("A LoRA adapter")
        return write_adapter(self.deltas, asdict(self.base), self.provenance, Path(folder), rank, served=served)

    def to_gguf(self, path: str | Path, lm: LanguageModel, rank: int | None = None) -> dict[str, float]:
        """Write a GGUF LoRA adapter that llama.cpp adds to the converted base. See `gguf.write_gguf`.

        `lm`: the base, of which only the family and shapes are read. Raises EditkitError for an edit that is more than
        a change of weights.
        """
        self.require_weights("A GGUF adapter")
        return write_gguf(self.deltas, asdict(self.base), self.provenance, Path(path), lm, rank)

    def push_to_hub(
        self,
        repo: str,
        *,
        licence: str = "other",
        record: Mapping[str, Any] | None = None,
        private: bool = True,
    ) -> str:
        """Upload the edit with a card to a repository of the Hugging Face Hub; the commit, for `from_hub`.

        - `repo`: USER/NAME; it is made where it is missing, `private` or not.
        - `licence`: of the edit, as the Hub names licences. `record`: of the run that measured it (record.json).

        Raises EditkitError where the Hub does not take it.
        """
        title, rows = self.shown()
        text = hub.card(title, rows, asdict(self.base), self.digest, self.provenance, licence, record)
        files = {hub.FILE: self.to_bytes(), hub.CARD: text.encode()}
        return hub.push(files, repo, private=private, message=f"{title}, digest {self.digest[:SHORT]}")

    @classmethod
    def from_hub(cls, repo: str, revision: str) -> "Edit":
        """The edit of a repository of the Hugging Face Hub.

        `revision`: a commit or tag, so that it stays the same edit; a branch moves. Raises EditkitError where there is
        none, EditFileError for a damaged file.
        """
        return cls.load(hub.pull(repo, revision))

    def to_bytes(self) -> bytes:
        """The file's bytes: the same edit always gives the same bytes."""
        return written(self._parts())

    def save(self, path: str | Path) -> Path:
        """Write the edit to `path`, completely or not at all. Raises OutputError when it cannot be written."""
        return write_bytes(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, *, note: bool = True) -> "Edit":
        """Read an edit. Raises EditFileError for a missing, damaged or foreign file.

        `note`: warn of a file that was written before files had a digest.
        """
        return cls(*read(path, note=note))

    def _parts(self) -> Parts:
        """What the file holds."""
        return Parts(self.deltas, self.base, self.provenance, self.parents, self.memory, self.installed)


@dataclass(repr=False)
class Applied(Shown):
    """What `Edit.applied` yields: the snapshot, and after the `with` the verified `reversal`."""

    snapshot: Snapshot
    reversal: Reversal | None = None

    def shown(self) -> tuple[str, Rows]:
        """Whether it is on the model, or what was verified after it."""
        return "Applied", [("state", "on the model" if self.reversal is None else f"restored, {self.reversal}")]


def relative_norm(lm: LanguageModel, edit: Edit) -> float:
    """‖ΔW‖/‖W‖ over the parameters that the edit changes (Frobenius); 0 for an edit that changes none."""
    if not edit.deltas:
        return 0.0
    weights = (values_of(lm.model, name).double().norm().item() for name in edit.parameters)
    return edit.norm() / math.sqrt(sum(norm**2 for norm in weights))


def combined(edits: Sequence[Edit], factors: Sequence[float]) -> Edit:
    """Σ factor · edit, as one edit of the base that all of them were computed for.

    Factors stay factors (their ranks add); with a dense change among them, the sum is dense. Raises EditkitError
    when the edits are of different bases, or one is more than a change of weights.
    """
    for edit in edits:
        edit.require_weights("A sum of edits")
        if edit.base.digest != edits[0].base.digest:
            raise EditkitError(
                f"Edits of different bases cannot be added: '{edits[0].base.name}' {edits[0].base.digest[:12]} and "
                f"'{edit.base.name}' {edit.base.digest[:12]}. Edits computed one on top of the other go into a "
                "Session, or through editkit.apply_files in their order."
            )
    deltas, of = scaled(edits, factors)
    return Edit(joined(deltas), edits[0].base, {"method": "combined", "of": of}, edits[0].parents)


def scaled(edits: Sequence[Edit], factors: Sequence[float]) -> tuple[list[Delta], list[dict[str, Any]]]:
    """The changes of all edits, each times its edit's factor; and factor, digest and provenance of each edit."""
    pairs = list(zip(edits, factors, strict=True))
    deltas = [replace(delta, left=factor * delta.left) for edit, factor in pairs for delta in edit.deltas]
    return deltas, [{"factor": f, "digest": edit.digest, "provenance": edit.provenance} for edit, f in pairs]


def compressed(edit: Edit, rank: int) -> Edit:
    """The edit with each ΔW cut to its `rank` largest singular values; provenance has the relative error made."""
    deltas, errors = [], {}
    for delta in edit.deltas:
        u, s, vt = delta.svd()
        deltas.append(replace(delta, left=(u[:, :rank] * s[:rank]).float(), right=vt[:rank].float()))
        errors[delta.parameter] = (s[rank:].norm() / s.norm().clamp_min(1e-300)).item()
    cut = {"rank": rank, "relative_error": errors}
    return replace(edit, deltas=tuple(deltas), provenance=edit.provenance | {"compressed": cut})
