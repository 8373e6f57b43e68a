"""MEMIT-Seq: MEMIT that keeps the facts a session has edited before (arXiv 2605.26670).

With K [d_ff, n] the keys of these facts at a block, R [d_model, n] the residuals to write there, C = E[k kᵀ], and K′
the keys of each earlier batch on the model that it has edited:

    ΔW = R Kᵀ (λ C + S + K Kᵀ)⁻¹,     S = Σ K′K′ᵀ

Least squares with S is recursive: in one block, batches written one after the other come to what one batch of all facts
would write, since R is what is still missing. Undoing a step takes its K′K′ᵀ out of S. The first step of a session, and
an edit outside of one, is MEMIT's. S is kept in a form that costs O(d_ff² n) a batch (shared/held.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.memit import MemitSettings, memit
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.prelude import Moments
from editkit.models.load import LanguageModel


@dataclass(frozen=True)
class MemitSeqSettings(MemitSettings):
    """MEMIT that keeps earlier facts (arXiv 2605.26670). Constants are MEMIT's, as the source has them."""

    keep_earlier: bool = True


def memit_seq(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: MemitSeqSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """One edit for all of `facts` at once, with the keys of `earlier` kept. Arguments and errors as for `memit`."""
    return memit(
        lm,
        facts,
        settings or MemitSeqSettings(),
        seed=seed,
        moments=moments,
        contexts=contexts,
        progress=progress,
        earlier=earlier,
        carried=carried,
    )


register("memit_seq", memit_seq, MemitSeqSettings)
