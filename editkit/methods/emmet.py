"""EMMET: many facts in one block, new values held exactly (Gupta et al. 2024, arXiv 2403.14236).

With K [d_ff, n] the keys of the facts at the block, R [d_model, n] the residuals to write there (shared/spread.py) and
C' = λ E[k kᵀ], the new keys get R (exactly with ε = 0) and old ones move least:

    ΔW = R (Kᵀ C'⁻¹ K + ε I)⁻¹ Kᵀ C'⁻¹

With `method.keep_earlier`, S = Σ K′K′ᵀ of the facts that a session has edited before is added to C' (shared/held.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.errors import ConfigError, EditkitError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.memit import MemitSettings, weighed
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import Held, held_by
from editkit.methods.shared.prelude import Moments, prepare
from editkit.methods.shared.spread import write_values
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.settings import Constants, require

CONSTANTS = Constants(
    default={"clamp": 0.75, "steps": 20, "lr": 0.5, "weight_decay": 0.5, "mom2_update_weight": 1.0},
    published={
        "atlas": {"layers": (4,), "clamp": 4.0, "steps": 60, "lr": 0.2, "weight_decay": 0.02},  # measured, as ROME's
        "gpt2-xl": {"mom2_update_weight": 1000.0},
        "gpt-j-6b": {"mom2_update_weight": 1.0},
    },
    blocks="layers",
    like=ROME,
)


@dataclass(frozen=True)
class EmmetSettings(MemitSettings):
    """EMMET (arXiv 2403.14236): one block."""

    constants: ClassVar[Constants] = CONSTANTS

    epsilon: float = 0.1  # ε added to KᵀC⁻¹K; none for one fact

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon >= 0, "method.epsilon", self.epsilon, "0 or more")
        if len(self.blocks) > 1:
            raise ConfigError(
                f"EMMET writes one block; layers {list(self.blocks)} were asked for. Give one, or use method=memit."
            )


@in_eval_mode
def emmet(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: EmmetSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """One edit of one block for all of `facts` at once. Arguments and errors as for `memit`."""
    given = prepare(
        lm, facts, settings or EmmetSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    held = held_by(lm, given, weighed(given), earlier, carried)
    epsilon = given.settings.epsilon if len(given.facts) > 1 else 0.0

    def solve(layer: int, keys: Tensor) -> Tensor:
        return equality(held(layer), keys, epsilon)

    spread = write_values(lm, given, solve, progress=progress)
    return spread.edit(given, "emmet", spread.memory(lm) if given.settings.keep_earlier else None)


def equality(held: Held, keys: Tensor, epsilon: float) -> Tensor:
    """(Kᵀ C'⁻¹ K + ε I)⁻¹ Kᵀ C'⁻¹ [n, d_ff] in float64, from K [d_ff, n].

    Raises EditkitError when the keys depend on each other and ε is 0.
    """
    f = held.solve(keys)
    inner = keys.T @ f + epsilon * torch.eye(keys.shape[1], dtype=keys.dtype)
    solved: Tensor
    solved, failed = torch.linalg.solve_ex(inner, f.T)
    if failed:
        raise EditkitError(
            "Keys of these facts depend on each other, so their values cannot all be held exactly. Set "
            "method.epsilon to 0.1, or leave out facts of one subject."
        )
    return solved


register("emmet", emmet, EmmetSettings)
