"""Factored: a second moment C ready to solve with. Identity: C = I."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from editkit.models.memory import free_bytes

LARGE = 4096  # dimensions from which memory decides how C is factored and solved with
LANCZOS = 30  # steps that estimate an eigenvalue of a large one


def cholesky(matrix: Tensor, shift: float = 0.0) -> tuple[Tensor, bool]:
    """The lower Cholesky factor of a symmetric `matrix` [d_ff, d_ff] + shift · I, and whether there is none.

    Beside `matrix` it takes the memory of the factor, and for the time of the work as much again where that is free:
    it is quicker so.
    """
    lower = matrix.clone()
    lower.diagonal().add_(shift)
    failed = torch.empty((), dtype=torch.int32)
    free = free_bytes()
    short = len(lower) > LARGE and free is not None and free < 2 * lower.nbytes
    into = lower.mT if short else lower  # in LAPACK's order it is factored where it is
    torch.linalg.cholesky_ex(into, out=(into, failed))
    return into, bool(failed)


def solved(lower: Tensor, keys: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ K [d_ff, n] for a lower factor L."""
    if len(lower) <= LARGE:
        return torch.cholesky_solve(keys, lower)  # copies L
    half = torch.linalg.solve_triangular(lower, keys, upper=False)
    found: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return found


@dataclass(frozen=True, eq=False)
class Factored:
    """A lower Cholesky factor of C (float64). Solving with it never forms an inverse."""

    lower: Tensor

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ k for keys [d_ff] or [d_ff, n], in float64 on the CPU."""
        k = keys.detach().double().cpu()
        return solved(self.lower, k[:, None])[:, 0] if k.ndim == 1 else solved(self.lower, k)

    def matrix(self, size: int) -> Tensor:
        """The factored matrix [size, size]."""
        return self.lower @ self.lower.T

    @property
    def condition(self) -> float:
        """Condition number of the factored matrix (largest over smallest eigenvalue); of a large one an estimate from
        below, within a few per cent."""
        return self._condition

    @functools.cached_property
    def _condition(self) -> float:
        if len(self.lower) > LARGE:
            largest = largest_eigenvalue(lambda x: self.lower @ (self.lower.mT @ x), len(self.lower))
            return largest * largest_eigenvalue(self.solve, len(self.lower))
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


def largest_eigenvalue(product: Callable[[Tensor], Tensor], size: int) -> float:
    """An estimate from below of the largest eigenvalue of a symmetric matrix [size, size], by Lanczos' method.

    `product`: its product with a vector [size]. Every new vector is made orthogonal to all earlier ones.
    """
    vector = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.zeros(min(LANCZOS, size), size, dtype=torch.float64)
    inner = torch.zeros(len(basis), len(basis), dtype=torch.float64)  # the matrix, as the basis sees it
    for step in range(len(basis)):
        basis[step] = vector / vector.norm()
        vector = product(basis[step])
        inner[step] = inner[:, step] = basis @ vector  # later rows of the basis are 0
        for _ in range(2):
            vector = vector - basis.T @ (basis @ vector)
    return float(torch.linalg.eigvalsh(inner)[-1])
