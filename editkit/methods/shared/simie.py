"""SimIE: a session's steps brought nearer to those of an ideal editor, for any method that remembers keys.

With ΔW the change that the method has computed for a step, K [d_ff, n] the keys of its facts, and the sum over all
steps of the session, this one included:

    W ← W + ΔW · K Kᵀ (λ I + Σ K Kᵀ)⁻¹

so the step keeps what it does to its own keys, as far as earlier steps have not claimed them.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from editkit.edits.edit import Edit
from editkit.errors import EditkitError
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import Diagonal, Held, least_squares
from editkit.moments import Identity


def simulated(step: Edit, earlier: Sequence[Edit], carried: Carried, weight: float) -> Edit:
    """The step as SimIE writes it. Its factors have the rank n.

    - `step`: as the method has computed it, with its keys in `memory`.
    - `earlier`: the session's steps before it. `carried`: what the session has computed from them.
    - `weight`: λ.

    Raises EditkitError for a method that remembers no keys.
    """
    deltas = []
    for delta in step.deltas:
        if (keys := step.memory.get(delta.module)) is None:
            raise EditkitError(
                f"method.simie needs the keys of each step, and method={step.provenance.get('method')} remembers none "
                f"of {delta.module}. Use memit_seq, encore, alphaedit or betaedit, or set method.keep_earlier=true."
            )
        keys, width = keys.double(), delta.shape[1]
        # The inverse over all experts together would be far too large.
        alone = Held(Identity(), weight)
        if delta.experts is not None:
            alone = Held(Diagonal(torch.full((width,), weight, dtype=torch.float64)))
        held = carried.state(("simie", delta.module), earlier, partial(_same, alone), partial(_add, delta.module))
        left = delta.left.double()
        left = left @ keys if delta.right is None else left @ (delta.right.double() @ keys)
        deltas.append(replace(delta, left=left.float(), right=least_squares(held, keys).float()))
    return replace(step, deltas=tuple(deltas), provenance=step.provenance | {"simie": weight})


def _same(held: Held) -> Held:
    return held


def _add(name: str, held: Held, edit: Edit) -> Held:
    """With the keys that `edit` remembers of the module `name`."""
    return held.also(edit.memory[name]) if name in edit.memory else held
