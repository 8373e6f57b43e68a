"""FT-L: fine-tuning of one weight, every entry of ΔW held within ±ε (Zhu et al. 2020, arXiv 2012.00363; ROME's FT+L).

    min over ΔW of   mean over facts of  −(1/T) Σ log p(target_new | prompt)      subject to  max |ΔW_ij| ≤ ε

as FT is (ft.py), projected on [−ε, ε] after each step of Adam.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.ft import FtSettings, ft
from editkit.methods.rome import CONSTANTS as ROME
from editkit.models.load import LanguageModel
from editkit.settings import Constants, require


@dataclass(frozen=True)
class FtLSettings(FtSettings):
    """FT with every entry of ΔW held within ±epsilon (arXiv 2012.00363, as in ROME's FT+L)."""

    constants: ClassVar[Constants] = Constants(
        {"lr": 5e-4, "epsilon": 1e-3},
        {
            # On 20 facts ES is .30 at .010, .90 at .015, 1.00 at .020 and without a bound.
            "atlas": {"lr": 1e-3, "epsilon": 0.015},
            "gpt2-medium": {"epsilon": 2e-3},
            "gpt2-large": {"epsilon": 1e-3},
            "gpt2-xl": {"epsilon": 5e-4},
            "gpt-j-6b": {"epsilon": 5e-5},
        },
        blocks="layer",
        like=ROME,
    )

    epsilon: float | None = None  # None: the constant of this model, in units of the weight

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon is None or self.epsilon > 0, "method.epsilon", self.epsilon, "positive")

    @property
    def bound(self) -> float | None:
        return self.epsilon


def ft_l(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: FtLSettings | None = None,
    *,
    progress: bool = True,
) -> Edit:
    """`ft` with every entry of ΔW held within ±epsilon, by model where the settings say None."""
    return ft(lm, facts, settings or FtLSettings(), progress=progress)


register("ft_l", ft_l, FtLSettings)
