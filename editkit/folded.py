"""Folded: the older steps of a long session, as one float64 sum for each parameter.

A session that keeps its latest k steps (`Session(..., keep=k)`) folds the one before them after each step:

    Σ_1 = ΔW_1,     Σ_j = Σ_{j−1} + ΔW_j          in float64, oldest first

which is the order in which a session without `keep` sums, so both have the same weights bit for bit. A folded step
cannot be undone, and its file is gone. What is left of it: its part of Σ, of what the method carries
(methods/shared/carried.py), and of a digest of all folded steps, by which later steps name them among their parents:

    d_0 = "",   d_j = sha256(d_{j−1} digest_j)
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from editkit.edits.base import Base
from editkit.edits.delta import Delta, delta_of
from editkit.edits.edit import FOLDED, Edit
from editkit.methods.shared.carried import Carried
from editkit.tensorfiles import FileKind, explained, read_tensors, require_fields, starting_with, to_bytes

FOLD_FILE = FileKind(
    format="editkit-fold/1",
    noun="the folded steps of a session",
    fields={"base": (dict,), "deltas": (list,), "steps": (int,), "facts": (int,), "chain": (str,), "states": (list,)},
    remedy="Copy the session's folder again, or begin a new session.",
    origin="Folded steps are written by session.save(folder).",
    renew="Session.load(folder, lm).save(folder)",
)


@dataclass(frozen=True, eq=False)
class Folded:
    """The folded steps of a session, oldest first; at first none.

    - `steps`, `facts`: how many of each.
    - `chain`: d above.
    - `sums`: Σ of each parameter as a dense Delta, whose `left` [d_model, d_ff] is in float64.
    """

    steps: int = 0
    facts: int = 0
    chain: str = ""
    sums: tuple[Delta, ...] = ()

    @property
    def parents(self) -> tuple[str, ...]:
        """What a later step names in place of the folded ones."""
        return (FOLDED + self.chain,) if self.steps else ()

    def plus(self, step: Edit) -> "Folded":
        """With one step more. Self stays as it is."""
        sums = {delta.parameter: delta for delta in self.sums}
        for delta in step.deltas:
            change, before = delta.change(), sums.get(delta.parameter)
            whole = change if before is None else before.left + change
            sums[delta.parameter] = replace(before or delta, left=whole, right=None)
        chain = hashlib.sha256((self.chain + step.digest).encode()).hexdigest()
        return Folded(self.steps + 1, self.facts + facts_in(step), chain, tuple(sums.values()))

    def to_bytes(self, base: Base, carried: Carried) -> bytes:
        """The bytes of its file. `carried`: the states after these steps. Raises EditkitError for one that cannot be
        saved."""
        states = carried.tensors()
        tensors = {f"{number}.left": delta.left for number, delta in enumerate(self.sums)}
        for number, parts in enumerate(states.values()):
            tensors |= {f"state {number}.{name}": tensor for name, tensor in parts.items()}
        header = {
            "base": asdict(base),
            "deltas": [delta.described() for delta in self.sums],
            "steps": self.steps,
            "facts": self.facts,
            "chain": self.chain,
            "states": list(states),
        }
        return to_bytes(FOLD_FILE, header, tensors)


def read_folded(path: Any) -> tuple[Folded, Carried]:
    """The folded steps in a file, and what their method carries. Raises EditFileError for a missing or damaged one."""
    header, tensors = read_tensors(path, FOLD_FILE)
    with explained(path, FOLD_FILE):
        require_fields(header["base"], dict.fromkeys(("name", "digest", "dtype"), (str,)), "its base")
        sums = tuple(delta_of(row, number, tensors) for number, row in enumerate(header["deltas"]))
        if any(delta.right is not None or delta.left.dtype != torch.float64 for delta in sums):
            raise ValueError("its sums are not dense float64 matrices")
        states = {name: starting_with(tensors, f"state {number}.") for number, name in enumerate(header["states"])}
        return Folded(header["steps"], header["facts"], header["chain"], sums), Carried(states)


def facts_in(step: Edit) -> int:
    """How many facts the step has edited."""
    return len(step.provenance.get("facts", ()))
