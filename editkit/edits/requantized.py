"""What is left of an edit when the edited weights are quantised again, by the scheme of their base.

With Q the quantiser, W the base's weight dequantised, and ΔW the edit:

    left = Q(W + ΔW) − Q(W)

A small ΔW moves few codes, and then by whole steps. Where it widens the range of a block, all of its codes move.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of
from editkit.models.quantized import quantized_again


@dataclass(frozen=True)
class Requantized:
    """How much of ΔW a quantiser leaves, over all weights that the edit changes."""

    kept: float  # ⟨left, ΔW⟩ / ‖ΔW‖²: 1 where all of it is left
    error: float  # ‖left − ΔW‖ / ‖ΔW‖
    codes_changed: float  # share of the weights' codes that differ between Q(W + ΔW) and Q(W)

    def columns(self) -> dict[str, float]:
        """The three numbers under the names of a table's columns."""
        return {f"requantized_{name}": value for name, value in asdict(self).items()}


@torch.no_grad()
def requantized(lm: LanguageModel, edit: Edit) -> Requantized | None:
    """What is left of `edit` when its weights are quantised again as those of `lm`, its base, are. `lm` is only read.

    None for a base that is not quantised, for a quantiser that needs texts (GPTQ, AWQ), and for an edit of nothing.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    changed = codes = 0
    for delta in edit.deltas:
        before = values_of(lm.model, delta.parameter)
        again = quantized_again(lm.model, delta.module, before)
        change = delta.matrix().to(before.device)
        after = quantized_again(lm.model, delta.module, before + change)
        if again is None or after is None:
            return None
        sums += sums_of((after[0] - again[0]).double(), change)
        changed += int((after[1] != again[1]).sum())
        codes += after[1].numel()
    found = kept_and_error(sums)
    return Requantized(*found, changed / codes) if found else None


def sums_of(left: Tensor, change: Tensor) -> Tensor:
    """[3]: ⟨left, ΔW⟩, ‖left − ΔW‖² and ‖ΔW‖² of one weight, to be added over weights. `left`: what rounding leaves."""
    found = (left * change).sum(), (left - change).square().sum(), change.double().square().sum()
    return torch.stack([value.double().cpu() for value in found])


def kept_and_error(sums: Tensor) -> tuple[float, float] | None:
    """`Requantized.kept` and `error`, from what `sums_of` gives; None where all ΔW are 0."""
    along, wrong, size = sums.tolist()
    return (along / size, (wrong / size) ** 0.5) if size else None
