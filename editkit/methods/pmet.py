"""PMET: precise model editing (Li et al. 2023, arXiv 2308.08742).

Two δ are optimised together, at the attention's and at the MLP's output of the last block of the range; only the MLP's
is written, so that what attention can do by itself is not forced into the MLP. The residual is shared out by the
square root, and the solve is MEMIT's:

    R = (v0 + δ_mlp − m now) / √(blocks left),     ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹

Once the target is the likeliest answer the NLL counts a tenth, and the loop ends when the KL is under 0.01.
With `method.keep_earlier`, λ C + S takes the place of λ C in a session (shared/held.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.memit import MemitSettings, weighed
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import held_by, least_squares
from editkit.methods.shared.prelude import Moments, prepare
from editkit.methods.shared.spread import write_values
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.settings import Constants, require

CONSTANTS = Constants(
    default={"clamp": 0.75, "steps": 30, "lr": 0.2, "weight_decay": 0.5, "mom2_update_weight": 6000.0},
    published={
        "atlas": {"layers": (3, 4), "mom2_update_weight": 10.0, "clamp": 8.0, "lr": 0.5},  # measured
        "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8)},
    },
    blocks="range",
    like=ROME,
)


@dataclass(frozen=True)
class PmetSettings(MemitSettings):
    """PMET (arXiv 2308.08742)."""

    constants: ClassVar[Constants] = CONSTANTS

    kl_factor: float = 1.0
    stop_kl: float = 0.01  # stop when the target is the likeliest and the KL is under this
    nll_weight: float = 0.1  # of the NLL once the target is the likeliest

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.stop_kl >= 0, "method.stop_kl", self.stop_kl, "0 or more")
        require(0 <= self.nll_weight <= 1, "method.nll_weight", self.nll_weight, "from 0 to 1")


@in_eval_mode
def pmet(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: PmetSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """One edit for all of `facts` at once. Arguments and errors as for `memit`."""
    given = prepare(
        lm, facts, settings or PmetSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    held = held_by(lm, given, weighed(given), earlier, carried)

    def solve(layer: int, keys: Tensor) -> Tensor:
        return least_squares(held(layer), keys)

    loss = {"nll_weight": given.settings.nll_weight, "stop_kl": given.settings.stop_kl}
    spread = write_values(lm, given, solve, progress=progress, with_attention=True, share=math.sqrt, **loss)
    return spread.edit(given, "pmet", spread.memory(lm) if given.settings.keep_earlier else None)


register("pmet", pmet, PmetSettings)
