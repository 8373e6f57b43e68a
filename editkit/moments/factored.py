"""Factored: a second moment C ready to solve with. Identity: C = I."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factored:
    """A lower Cholesky factor of C (float64). Solving with it never forms an inverse."""

    lower: Tensor

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ k for keys [d_ff] or [d_ff, n], in float64 on the CPU."""
        k = keys.detach().double().cpu()
        solved = torch.cholesky_solve(k[:, None] if k.ndim == 1 else k, self.lower)
        return solved[:, 0] if k.ndim == 1 else solved

    def matrix(self, size: int) -> Tensor:
        """The factored matrix [size, size]."""
        return self.lower @ self.lower.T

    @property
    def condition(self) -> float:
        """Condition number of the factored matrix (largest over smallest eigenvalue)."""
        return self._condition

    @functools.cached_property
    def _condition(self) -> float:
        values = torch.linalg.svdvals(self.lower)
        return float(values[0] / values[-1]) ** 2


class Identity(Factored):
    """C = I: what some ports of ROME use, and a null control."""

    def __init__(self) -> None:
        super().__init__(torch.eye(1, dtype=torch.float64))

    def solve(self, keys: Tensor) -> Tensor:
        return keys.detach().double().cpu()

    def matrix(self, size: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64)
