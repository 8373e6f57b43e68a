"""Norm-anchored scaling (NAS, 2026, arXiv 2602.02543): every value is brought to one norm.

Over thousands of edits the norms of the values grow with that of the edited weight, and the edits with them. With v0
the down-projection's output for the bare prompt at the last block to be written, δ the change that was found there,
and a the anchor:

    v* = v0 + δ;      v* ← a · v*/‖v*‖;      where ‖v*‖ > 2 a the fact is left out: v* = v0

a is the mean of ‖v*‖ over pilot edits of the unedited model, the largest 5 % of them dropped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.errors import EditkitError

TOO_LARGE = 2.0  # times the anchor
DROPPED = 0.05  # of the pilots, those with the largest values


class Anchored(NamedTuple):
    """What becomes of the values of n facts."""

    delta: Tensor  # [n, d_model]
    norms: Tensor  # ‖v0 + δ‖ before [n]
    skipped: Tensor  # whether the fact is left out [n]


def anchored(start: Tensor, delta: Tensor, anchor: float | None) -> Anchored:
    """δ with which v0 + δ has the norm of the anchor.

    - `start`, `delta`: v0 and δ, [n, d_model].
    - `anchor`: a; None changes nothing.
    """
    values = start + delta
    norms = values.norm(dim=-1)
    if anchor is None:
        return Anchored(delta, norms, torch.zeros(len(norms), dtype=torch.bool))
    skipped = norms > TOO_LARGE * anchor
    scaled = anchor * values / norms[:, None] - start
    return Anchored(torch.where(skipped[:, None], 0.0, scaled), norms, skipped)


def pilot_anchor(edits: Edit | Sequence[Edit]) -> float:
    """The anchor a, from pilot edits of the unedited model that have none themselves. The source takes 1,000 facts.

    Raises EditkitError for edits of a method without values, or with an anchor.
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    norms = [each.get("value_norm") for edit in edits for each in edit.provenance.get("reports", ())]
    anchors = [edit.provenance.get("settings", {}).get("anchor") for edit in edits]
    if not norms or None in norms or any(anchor is not None for anchor in anchors):
        raise EditkitError(
            "An anchor is the mean norm of the values of pilot edits; these edits have none, or were computed with "
            "an anchor themselves. Compute them with a method of the kind of ROME or MEMIT, with method.anchor=null."
        )
    found = torch.tensor(norms, dtype=torch.float64).sort().values
    return found[: max(1, len(found) - int(DROPPED * len(found)))].mean().item()
