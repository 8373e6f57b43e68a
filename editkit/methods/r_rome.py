"""R-ROME: ROME with the context-mean key on both sides (Gupta et al. 2024, arXiv 2403.07175). The recommended default.

    ΔW = r uᵀ / (k · u),     u = C⁻¹ k,     k = the key's mean over contexts,     r = v0 + δ − mean(m)

It removes the tiny k · u that make single ROME edits collapse a model (see rome.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.rome import RomeSettings, rome
from editkit.methods.shared.prelude import Moments
from editkit.models.load import LanguageModel


@dataclass(frozen=True)
class RRomeSettings(RomeSettings):
    """ROME with the context-mean key on both sides (arXiv 2403.07175): the recommended default."""

    keys: str = "mean"


def r_rome(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: RRomeSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """The R-ROME edit for one fact, or for several written one after the other. Arguments and errors as for `rome`."""
    settings = settings or RRomeSettings()
    return rome(lm, facts, settings, seed=seed, moments=moments, contexts=contexts, progress=progress)


register("r_rome", r_rome, RRomeSettings)
