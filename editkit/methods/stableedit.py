"""StableEdit: UltraEdit with whitened gradients, a stronger ridge and warm statistics (2026, arXiv 2605.11836).

As UltraEdit (ultraedit.py), and as soon as the session has seen more than q + 1 tokens

    ĝ = (g − μ_g) Σ^(−½)      Σ [q, q] the covariance of g over all tokens of the session, divided by n − q − 1

before that, UltraEdit's ĝ = (g − μ_g)/σ_g. Eigenvalues of Σ are held at 1e-6 or more, and α is 10. The covariance is
computed from the gradients that each edit remembers.

The statistics begin with a pass that edits nothing: over `method.warm_up` tokens of running text, on the unedited
model. The authors' code warms them up on 2,000 facts of a training set, which it edits into the model on the way. To
do that here, edit such facts first, with method.warm_up=0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.prelude import Moments
from editkit.methods.ultraedit import Statistics, UltraEditSettings, ultraedit, warmed
from editkit.models.load import LanguageModel


@dataclass(frozen=True)
class StableEditSettings(UltraEditSettings):
    """StableEdit (arXiv 2605.11836). Modules and η are UltraEdit's, as in the authors' files."""

    method: ClassVar[str] = "stableedit"
    whitens: ClassVar[bool] = True

    alpha: float = 10.0
    warm_up: int | None = 2000  # tokens of running text; the authors take 2,000 facts


def stableedit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: StableEditSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
    base: Statistics | None = None,
) -> Edit:
    """One edit for all of `facts` at once, from one backward pass. Arguments and errors as for `ultraedit`."""
    settings = settings or StableEditSettings()
    return ultraedit(lm, facts, settings, seed=seed, moments=moments, earlier=earlier, carried=carried, base=base)


register("stableedit", stableedit, StableEditSettings, base=warmed)
