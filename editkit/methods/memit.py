"""MEMIT: many facts over a range of blocks (Meng et al. 2023, arXiv 2210.07229).

With K [d_ff, n] the keys of the facts at a block, R [d_model, n] the residuals to write there (shared/spread.py) and
C = E[k kᵀ], least squares lets old keys keep their values and gives R to the new ones:

    ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹

By Woodbury's identity

    Kᵀ (λ C + K Kᵀ)⁻¹ = (λ I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹

so it needs one n × n solve and the Cholesky factor of C; with more facts than d_ff, it solves in d_ff instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.prelude import Moments, prepare
from editkit.methods.shared.spread import write_values
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.moments import Factored
from editkit.settings import EASYEDIT, Constants, SpreadSettings, require

# The authors' hparams files; the atlas model's are measured, as ROME's.
CONSTANTS = Constants(
    default={"clamp": 0.75, "steps": 20, "lr": 0.5, "weight_decay": 0.5, "mom2_update_weight": 15_000.0},
    published={
        "atlas": {
            "layers": (3, 4),
            "clamp": 4.0,
            "steps": 60,
            "lr": 0.2,
            "weight_decay": 0.02,
            "mom2_update_weight": 10.0,
        },
        "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "mom2_update_weight": 20_000.0},
        "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8), "steps": 25},
        "Llama-3-8B": {"layers": (4, 5, 6, 7, 8), "lr": 0.1},
        "Llama-2-7B": {"layers": (4, 5, 6, 7, 8), **EASYEDIT},
        "Llama-3.2-3B": {"layers": (2, 3, 4, 5, 6), **EASYEDIT},  # EasyEdit's own file has blocks 4 to 8
        # EasyEdit and SPHERE. NAS (arXiv 2602.02543) disagrees: blocks 7 to 11, lr .1, decay .5, clamp .75.
        "Qwen2.5-7B": {"layers": (4, 5, 6, 7, 8), **EASYEDIT},
    },
    blocks="range",
    like=ROME,
)


@dataclass(frozen=True)
class MemitSettings(SpreadSettings):
    """MEMIT (arXiv 2210.07229)."""

    constants: ClassVar[Constants] = CONSTANTS

    mom2_update_weight: float | None = None  # λ: how many keys of running text C counts as

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.mom2_update_weight
        require(weight is None or weight > 0, "method.mom2_update_weight", weight, "positive")


@in_eval_mode
def memit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: MemitSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """One edit for all of `facts` at once. Arguments and errors as for `rome`."""
    given = prepare(
        lm, facts, settings or MemitSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    weight = given.settings.mom2_update_weight
    assert weight is not None  # resolved
    factored = given.factored  # before the values, so that a C which cannot be factored fails at once

    def solve(layer: int, keys: Tensor) -> Tensor:
        return least_squares(factored[layer], keys, weight)

    return write_values(lm, given, solve, progress=progress).edit(given, "memit")


def least_squares(factored: Factored, keys: Tensor, weight: float) -> Tensor:
    """Kᵀ (λ C + K Kᵀ)⁻¹ [n, d_ff] in float64, from K [d_ff, n], by the smaller of two solves."""
    n, d_ff = keys.shape[1], keys.shape[0]
    if n < d_ff:
        weighed = factored.solve(keys)  # C⁻¹ K
        inner = weight * torch.eye(n, dtype=keys.dtype) + keys.T @ weighed
        small: Tensor = torch.linalg.solve(inner, weighed.T)
        return small
    large: Tensor = torch.linalg.solve(weight * factored.matrix(d_ff) + keys @ keys.T, keys)
    return large.T


register("memit", memit, MemitSettings)
