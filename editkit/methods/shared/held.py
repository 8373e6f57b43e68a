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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.prelude import Given
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.moments import Factored
from editkit.moments.experts import FactoredExperts

MANY = 1 / 16  # of d_ff: with more earlier keys than this, Q costs less than the solves without it


@dataclass(frozen=True, eq=False)
class Held:
    """A = λC + S at one block, in float64 on the CPU. `prior`, `weight`: C as it is factored, and λ."""

    prior: Factored
    weight: float = 1.0
    keys: Tensor | None = None  # H [d_ff, m] while there are few
    weighed: Tensor | None = None  # G [d_ff, m]
    inverse: Tensor | None = None  # Q [d_ff, d_ff] once there are many

    def solve(self, keys: Tensor) -> Tensor:
        """A⁻¹ K [d_ff, n], from K [d_ff, n]."""
        if self.inverse is not None:
            known: Tensor = self.inverse @ keys.double()
            return known
        found: Tensor = self.prior.solve(keys) / self.weight
        if self.keys is None or self.weighed is None:
            return found
        return found - self.weighed @ torch.linalg.solve(_with_one(self.keys.T @ self.weighed), self.keys.T @ found)

    def also(self, keys: Tensor) -> "Held":
        """A + K′K′ᵀ, from K′ [d_ff, n]."""
        keys = keys.double()
        if self.inverse is not None:
            f = self.inverse @ keys
            inverse = self.inverse - f @ torch.linalg.solve(_with_one(keys.T @ f), f.T)
            return replace(self, inverse=(inverse + inverse.T) / 2)
        weighed = self.prior.solve(keys) / self.weight
        if self.keys is not None and self.weighed is not None:
            keys, weighed = torch.cat([self.keys, keys], 1), torch.cat([self.weighed, weighed], 1)
        more = replace(self, keys=keys, weighed=weighed)
        d_ff, m = keys.shape
        # The inverse over all experts together would be far too large.
        if m <= MANY * d_ff or isinstance(self.prior, FactoredExperts):
            return more
        prior = replace(self, inverse=self.prior.solve(torch.eye(d_ff, dtype=torch.float64)) / self.weight, keys=None)
        return replace(prior, weighed=None).also(keys)

    def matrix(self, size: int) -> Tensor:
        """A [size, size]."""
        if self.inverse is not None:
            direct: Tensor = torch.linalg.inv(self.inverse)
            return direct
        text = self.weight * self.prior.matrix(size)
        return text if self.keys is None else text + self.keys @ self.keys.T


def held_by(
    lm: LanguageModel, given: Given[Any], priors: dict[int, Held], earlier: Sequence[Edit], carried: Carried | None
) -> dict[int, Held]:
    """A of each layer, where `given.settings.keep_earlier`; else what holds without earlier facts, `priors`.

    - `earlier`: the method's edits that `lm` holds, with their keys in `memory`.
    - `carried`: the session's; None outside of one.
    """
    if not given.settings.keep_earlier:
        return priors
    carried = carried or Carried()

    def of(layer: int) -> Held:
        name = down_of(lm, layer)

        def add(held: Held, edit: Edit) -> Held:
            return held.also(edit.memory[name]) if name in edit.memory else held

        return carried.state(("held", name), earlier, lambda: priors[layer], add)

    return {layer: of(layer) for layer in given.layers}


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
