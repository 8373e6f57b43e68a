"""What a solve leaves where it is: keys of running text, and in a session those of the facts edited before.

With λC for the text, H [d_ff, m] the keys of all earlier facts and S = H Hᵀ, a method that keeps earlier facts solves
with A = λC + S in place of λC (MEMIT-Seq, arXiv 2605.26670). All that it asks of A is A⁻¹ K, by Woodbury's identity:

    few earlier keys:    A⁻¹ K = M − G (I + HᵀG)⁻¹ HᵀM,      M = (λC)⁻¹ K,  G = (λC)⁻¹ H
    many:                Q = A⁻¹ [d_ff, d_ff] is kept, and after each step (arXiv 2601.15686)
                         Q ← Q − F (I + K′ᵀF)⁻¹ Fᵀ,          F = Q K′            O(d_ff² n), not O(d_ff³)

The form is a matter of m alone, so the same steps always give the same bits.

K′ are the keys of a step on the model that it has edited. The source measures them again after the last block; here
they are those of the solve, which are the same: block l is solved for when all blocks below it hold their new weights,
and the key of a block depends on no other (tests/test_carried.py compares them). Where a session transforms its total,
they are the keys before the transform.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.methods.shared.carried import Carried, Form
from editkit.methods.shared.prelude import Given
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.moments import Factored, Identity
from editkit.moments.experts import FactoredExperts

MANY = 1 / 16  # of d_ff: with more earlier keys than this, Q costs less than the solves without it


@dataclass(frozen=True, eq=False)
class Earlier:
    """What a session carries of S at one block, in float64 on the CPU. Nothing of it before the first step."""

    keys: Tensor | None = None  # H [d_ff, m] while there are few
    weighed: Tensor | None = None  # G [d_ff, m]
    inverse: Tensor | None = None  # Q [d_ff, d_ff] once there are many

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Earlier":
        """From `tensors`, among which there may be others."""
        return cls(*(tensors.get(name) for name in ("keys", "weighed", "inverse")))


EARLIER = Form(Earlier.tensors, Earlier.of)


class Diagonal(Factored):
    """A diagonal matrix, too large for its inverse to be kept with S in it. `values` [d_ff]."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(torch.empty(0, dtype=torch.float64))
        self.values = values.double()

    def solve(self, keys: Tensor) -> Tensor:
        return keys.detach().double().cpu() / self.values[:, None]

    def matrix(self, size: int) -> Tensor:
        return torch.diag(self.values)


@dataclass(frozen=True, eq=False)
class Held:
    """A = λC + S at one block, in float64 on the CPU.

    - `text`: C as it is factored. `weight`: λ.
    - `earlier`: S.
    """

    text: Factored
    weight: float = 1.0
    earlier: Earlier = Earlier()

    def solve(self, keys: Tensor) -> Tensor:
        """A⁻¹ K [d_ff, n], from K [d_ff, n]."""
        h, g, q = self.earlier.keys, self.earlier.weighed, self.earlier.inverse
        if q is not None:
            known: Tensor = q @ keys.double()
            return known
        found: Tensor = self.text.solve(keys) / self.weight
        return found if h is None or g is None else found - g @ torch.linalg.solve(_with_one(h.T @ g), h.T @ found)

    def also(self, keys: Tensor) -> "Held":
        """A + K′K′ᵀ, from K′ [d_ff, n]."""
        keys, before = keys.double(), self.earlier
        if before.inverse is not None:
            f = before.inverse @ keys
            q = before.inverse - f @ torch.linalg.solve(_with_one(keys.T @ f), f.T)
            return replace(self, earlier=Earlier(inverse=(q + q.T) / 2))
        weighed = self.text.solve(keys) / self.weight
        if before.keys is not None and before.weighed is not None:
            keys, weighed = torch.cat([before.keys, keys], 1), torch.cat([before.weighed, weighed], 1)
        d_ff, m = keys.shape
        # Of experts the inverse over all of them together would be far too large.
        if m <= MANY * d_ff or isinstance(self.text, FactoredExperts | Diagonal):
            return replace(self, earlier=Earlier(keys, weighed))
        inverse = self.text.solve(torch.eye(d_ff, dtype=torch.float64)) / self.weight
        return replace(self, earlier=Earlier(inverse=inverse)).also(keys)

    def matrix(self, size: int) -> Tensor:
        """A [size, size]."""
        if self.earlier.inverse is not None:
            direct: Tensor = torch.linalg.inv(self.earlier.inverse)
            return direct
        text, h = self.weight * self.text.matrix(size), self.earlier.keys
        return text if h is None else text + h @ h.T


def held_by(
    lm: LanguageModel,
    given: Given[Any],
    text: Callable[[int], Held],
    earlier: Sequence[Edit],
    carried: Carried | None,
) -> Callable[[int], Held]:
    """A of a layer: with the keys of `earlier` where `given.settings.keep_earlier`, else of running text alone.

    - `text`: λC of a layer, as it is without earlier facts.
    - `earlier`: the method's edits that `lm` holds, with their keys in `memory`.
    - `carried`: the session's; None outside of one.
    """
    if not given.settings.keep_earlier:
        return text
    states = carried or Carried()

    def held(layer: int) -> Held:
        name = down_of(lm, layer)
        return carried_on(text(layer), f"held {name}", name, earlier, states)

    return held


def carried_on(
    alone: Held,
    state: str,
    module: str,
    earlier: Sequence[Edit],
    carried: Carried,
    keys_of: Callable[[Tensor], Tensor] = Tensor.double,
) -> Held:
    """`alone` with S of the keys that the edits `earlier` remember of `module`.

    - `alone`: A without earlier facts. `state`: the name of S in `carried`.
    - `keys_of`: the keys as A is solved with, from those that are remembered [d_ff, n].
    """

    def add(before: Earlier, edit: Edit) -> Earlier:
        if module not in edit.memory:
            return before
        return replace(alone, earlier=before).also(keys_of(edit.memory[module])).earlier

    return replace(alone, earlier=carried.state(state, earlier, Earlier, add, EARLIER))


def plain(weight: float, width: int, *, experts: bool) -> Held:
    """λ I [width, width]. Of `experts` as a diagonal matrix: the inverse over all of them would be far too large."""
    return Held(Diagonal(torch.full((width,), weight, dtype=torch.float64))) if experts else Held(Identity(), weight)


def least_squares(held: Held, keys: Tensor) -> Tensor:
    """Kᵀ (A + K Kᵀ)⁻¹ = (I + KᵀA⁻¹K)⁻¹ KᵀA⁻¹ [n, d_ff] in float64, from K [d_ff, n], by the smaller of two solves."""
    d_ff, n = keys.shape
    if n < d_ff:
        f = held.solve(keys)
        small: Tensor = torch.linalg.solve(_with_one(keys.T @ f), f.T)
        return small
    large: Tensor = torch.linalg.solve(held.matrix(d_ff) + keys @ keys.T, keys)
    return large.T


def _with_one(matrix: Tensor) -> Tensor:
    """I + the matrix [n, n]."""
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype)
