"""ENCORE: MEMIT that keeps earlier facts, holds ‖ΔW‖ down and stops values early (2025, arXiv 2502.01636).

With K [d_ff, n] the keys of these facts at a block, R [d_model, n] the residuals to write there, C = E[k kᵀ], and S =
Σ K Kᵀ over the facts edited before (shared/held.py):

    ΔW = R Kᵀ (λ C + γ I + S + K Kᵀ)⁻¹

γ makes a change cost in directions in which running text has no keys. "Most-probable early stopping": the value of a
fact also stops at the m-th step at which all tokens of the target are the likeliest ones, after every context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.memit import CONSTANTS as MEMIT
from editkit.methods.memit import MemitSettings
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import Held, held_by, least_squares
from editkit.methods.shared.prelude import Given, Moments, prepare
from editkit.methods.shared.spread import write_values
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.moments import Identity
from editkit.settings import Constants, require

# γ and m of the paper; everything else as for MEMIT.
OWN = {
    "atlas": {"gamma": 1.0, "stop_likeliest": 2},  # measured
    "gpt2-xl": {"gamma": 10.0, "stop_likeliest": 4},
    "Llama-2-7B": {"gamma": 10.0, "stop_likeliest": 3, "lr": 0.5},
    "Llama-3-8B": {"gamma": 20.0, "stop_likeliest": 2, "lr": 0.5},
}
CONSTANTS = Constants(
    default={**MEMIT.default, "gamma": 10.0, "stop_likeliest": 3},
    published={name: {**MEMIT.published.get(name, {}), **OWN.get(name, {})} for name in {**MEMIT.published, **OWN}},
    blocks=MEMIT.blocks,
    like=MEMIT.like,
)


@dataclass(frozen=True)
class EncoreSettings(MemitSettings):
    """ENCORE (arXiv 2502.01636)."""

    constants: ClassVar[Constants] = CONSTANTS

    keep_earlier: bool = True
    gamma: float | None = None  # γ, in units of λ C
    stop_likeliest: int | None = None  # m; None: the model's constant

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma is None or self.gamma >= 0, "method.gamma", self.gamma, "0 or more")
        times = self.stop_likeliest
        require(times is None or times > 0, "method.stop_likeliest", times, "positive")


@in_eval_mode
def encore(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: EncoreSettings | None = None,
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
        lm, facts, settings or EncoreSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    held = held_by(lm, given, damped(given), earlier, carried)

    def solve(layer: int, keys: Tensor) -> Tensor:
        return least_squares(held(layer), keys)

    spread = write_values(lm, given, solve, progress=progress, stop_likeliest=given.settings.stop_likeliest)
    return spread.edit(given, "encore", spread.memory(lm) if given.settings.keep_earlier else None)


def damped(given: Given[EncoreSettings]) -> Callable[[int], Held]:
    """λ C + γ I of a layer: C is factored with γ/λ more on its diagonal."""
    weight, gamma = given.settings.mom2_update_weight, given.settings.gamma
    assert weight is not None and gamma is not None  # resolved

    def text(layer: int) -> Held:
        moment = given.moments[layer]
        if moment is None:
            return Held(Identity(), weight + gamma)
        mean = moment.matrix.diagonal(dim1=-2, dim2=-1).mean().item()  # a ridge is in units of it
        return Held(moment.factor(given.ridge + gamma / weight / mean), weight)

    for layer in given.layers:  # so that a C which cannot be factored fails before the values
        if (moment := given.moments[layer]) is not None and moment.keeps:
            text(layer)
    return text


register("encore", encore, EncoreSettings)
