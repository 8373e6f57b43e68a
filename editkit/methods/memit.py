"""MEMIT: many facts over a range of blocks (Meng et al. 2023, arXiv 2210.07229).

With K [d_ff, n] the keys of the facts at a block, R [d_model, n] the residuals to write there (shared/spread.py) and
C = E[k kᵀ], least squares lets old keys keep their values and gives R to the new ones:

    ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹

By Woodbury's identity, with F = (λ C)⁻¹ K,

    Kᵀ (λ C + K Kᵀ)⁻¹ = (I + KᵀF)⁻¹ Fᵀ

so it needs one n × n solve and the Cholesky factor of C; with more facts than d_ff, it solves in d_ff instead.

With `method.keep_earlier`, λ C + S takes the place of λ C in a session: S = Σ K′K′ᵀ over the facts edited before
(shared/held.py). MEMIT-Seq is MEMIT with it (memit_seq.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import Held, held_by, least_squares
from editkit.methods.shared.prelude import Given, Moments, prepare
from editkit.methods.shared.spread import write_values
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
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
    keep_earlier: bool = False  # in a session: hold the keys of facts edited before where they are (S)

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
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """One edit for all of `facts` at once. Arguments and errors as for `rome`.

    - `earlier`: this method's edits that `lm` already holds. With `keep_earlier` their keys are kept where they are.
    - `carried`: what a session has computed from them.
    """
    given = prepare(
        lm, facts, settings or MemitSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    held = held_by(lm, given, weighed(given), earlier, carried)

    def solve(layer: int, keys: Tensor) -> Tensor:
        return least_squares(held(layer), keys)

    spread, keep = write_values(lm, given, solve, progress=progress), given.settings.keep_earlier
    return spread.edit(given, "memit_seq" if keep else "memit", spread.memory(lm) if keep else None)


def weighed(given: Given[MemitSettings]) -> Callable[[int], Held]:
    """λ C of a layer. Call it before the values, so that a C which cannot be factored fails at once."""
    factored, weight = given.factored, given.settings.mom2_update_weight
    assert weight is not None  # resolved
    return lambda layer: Held(factored[layer], weight)


register("memit", memit, MemitSettings)
