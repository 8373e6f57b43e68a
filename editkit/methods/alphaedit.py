"""AlphaEdit: null-space constrained editing (Fang et al. 2024, arXiv 2410.02355).

With P the projector on the directions in which running text has next to no keys (eigenvectors of C = E[k kᵀ] with an
eigenvalue under a threshold), K the keys of these facts and K_p those of the facts edited before:

    ΔW = R Kᵀ P (P (K Kᵀ + K_p K_pᵀ) P + l2 · I)⁻¹

which is the transpose of the paper's Δᵀ = (P (K Kᵀ + K_p K_pᵀ) + l2 · I)⁻¹ P K Rᵀ, made symmetric: its range lies
in P's, where both agree. It is solved there: with B [d_ff, rank] a basis of it, P = B Bᵀ, and K_B = BᵀK,

    ΔW = R K_Bᵀ (A + K_B K_Bᵀ)⁻¹ Bᵀ,      A = Bᵀ K_p K_pᵀ B + l2 · I

K_p is kept in each edit's `memory` and handed back as `earlier`, never in a global; a session carries A from step to
step (shared/held.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import Held, carried_on, least_squares, plain
from editkit.methods.shared.prelude import Moments, prepare
from editkit.methods.shared.spread import write_values
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.moments import SecondMoment
from editkit.settings import EASYEDIT, Constants, SpreadSettings, require

CONSTANTS = Constants(
    default={"clamp": 0.75, "steps": 25, "lr": 0.1, "weight_decay": 0.5, "l2": 10.0},
    published={
        "atlas": {  # measured, as ROME's
            "layers": (3, 4),
            "clamp": 4.0,
            "steps": 60,
            "lr": 0.2,
            "weight_decay": 0.02,
            "l2": 1.0,
            "fraction": 0.75,
        },
        "gpt2-xl": {"layers": (13, 14, 15, 16, 17)},
        "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8)},
        "Llama-3-8B": {"layers": (4, 5, 6, 7, 8), "l2": 10.0},  # the authors' file; EasyEdit's has l2 1, earlier 10
        "Llama-2-7B": {"layers": (4, 5, 6, 7, 8), **EASYEDIT},  # EasyEdit's for MEMIT; nobody's for AlphaEdit
        "Llama-3.2-3B": {"layers": (2, 3, 4, 5, 6), **EASYEDIT},  # likewise; EasyEdit's own file has blocks 4 to 8
        # EasyEdit and SPHERE; EasyEdit has l2 1. NAS (arXiv 2602.02543) disagrees in all but steps and l2, where it has
        # the authors' 10: blocks 7 to 11, lr .1, decay .5, clamp .75.
        "Qwen2.5-7B": {"layers": (4, 5, 6, 7, 8), "l2": 1.0, **EASYEDIT},
    },
    blocks="range",
    like=ROME,
)


@dataclass(frozen=True)
class AlphaEditSettings(SpreadSettings):
    """AlphaEdit (arXiv 2410.02355)."""

    constants: ClassVar[Constants] = CONSTANTS

    threshold: float = 0.02  # eigenvalues of C under this span the null space (it depends on the scale of the keys)
    fraction: float | None = None  # instead: the share of C's directions, those of least energy, to call the null space
    l2: float | None = None  # factor of I in the solve
    keep_earlier: bool = True  # hold the keys of facts edited before where they are (the paper's K_p)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threshold > 0, "method.threshold", self.threshold, "positive")
        require(self.fraction is None or 0 < self.fraction <= 1, "method.fraction", self.fraction, "in (0, 1]")
        require(self.l2 is None or self.l2 > 0, "method.l2", self.l2, "positive")

    @property
    def takes_identity(self) -> bool:
        return False  # which has no null space


@in_eval_mode
def alphaedit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: AlphaEditSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """One edit for all of `facts` at once. Arguments and errors as for `rome`.

    - `earlier`: this method's edits that `lm` already holds; their keys are kept where they are.
    - `carried`: what a session has computed from them.

    Raises EditkitError when the null space is empty.
    """
    given = prepare(
        lm, facts, settings or AlphaEditSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    asked = given.settings
    l2 = asked.l2
    assert l2 is not None  # resolved
    bases = {layer: null_space(c, layer, asked.threshold, asked.fraction) for layer, c in given.moments.items()}
    states = carried or Carried()

    def solve(layer: int, keys: Tensor) -> Tensor:
        held = held_in(bases[layer], down_of(lm, layer), l2, earlier if asked.keep_earlier else (), states)
        return constrained(bases[layer], held, keys)

    spread = write_values(lm, given, solve, progress=progress)
    for report in spread.layers:
        report["null_space"] = rank_of(bases[report["layer"]])
    return spread.edit(given, "alphaedit", spread.memory(lm))


def null_space(moment: SecondMoment | None, layer: int, threshold: float, fraction: float | None) -> Tensor:
    """An orthonormal basis [d_ff, rank] of C's null space: eigenvalues under `threshold`, or the least `fraction`.

    Of a mixture of experts the eigenvectors of each block [E, d_ff, d_ff], with 0 in place of those left out.

    Raises EditkitError for an empty one, naming the eigenvalues that there are.
    """
    if moment is None:
        raise EditkitError("AlphaEdit needs second moments: moments.enabled=false leaves no null space. Turn it on.")
    values, vectors = moment.eigenvectors
    values, order = values.flatten().sort()
    rank = int((values < threshold).sum()) if fraction is None else round(fraction * len(values))
    if rank == 0:
        raise EditkitError(
            f"The null space at layer {layer} is empty: C's eigenvalues go from {values[0]:.3g} to "
            f"{values[-1]:.3g} and none is under method.threshold={threshold:g}. Raise it, or give method.fraction=0.5."
        )
    if vectors.ndim == 3:
        kept = torch.zeros(len(values), dtype=values.dtype)
        kept[order[:rank]] = 1
        return vectors * kept.view(len(vectors), 1, -1)
    return vectors[:, :rank]


def held_in(basis: Tensor, module: str, l2: float, earlier: Sequence[Edit], carried: Carried) -> Held:
    """l2 I and the keys of `earlier` at `module`, in the null space of `basis`."""
    if basis.ndim == 2:
        alone = plain(l2, rank_of(basis), experts=False)
    else:
        alone = plain(l2, basis.shape[0] * basis.shape[1], experts=True)
    return carried_on(alone, f"held {module}", module, earlier, carried, partial(in_basis, basis))


def rank_of(basis: Tensor) -> int:
    """The dimension of the null space that `null_space` gave."""
    return int(basis.any(-2).sum()) if basis.ndim == 3 else basis.shape[1]


def constrained(basis: Tensor, held: Held, keys: Tensor) -> Tensor:
    """K_Bᵀ (A + K_B K_Bᵀ)⁻¹ Bᵀ [n, d_ff] in float64, from K [d_ff, n].

    - `basis`: B, as `null_space` gives it. `held`: A.
    """
    return out_of_basis(basis, least_squares(held, in_basis(basis, keys)).T).T


def in_basis(basis: Tensor, x: Tensor) -> Tensor:
    """Bᵀ X [rank, n] in float64, from X [d_ff, n]."""
    return _times(basis.mT, x.double())


def out_of_basis(basis: Tensor, x: Tensor) -> Tensor:
    """B X [d_ff, n], from X [rank, n]."""
    return _times(basis, x)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """The product of a matrix, or of a block-diagonal one [E, rows, columns], with x [.., n]."""
    if matrix.ndim == 3:
        return torch.bmm(matrix, x.reshape(len(matrix), -1, x.shape[1])).flatten(0, 1)
    return matrix @ x


register("alphaedit", alphaedit, AlphaEditSettings)
