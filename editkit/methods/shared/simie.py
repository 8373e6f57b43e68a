"""SimIE: a session's steps brought nearer to those of an ideal editor, for any method that remembers keys.

With ΔW the change that the method has computed for a step, K [d_ff, n] the keys of its facts, and the sum over all
steps of the session, this one included:

    W ← W + ΔW · K Kᵀ (λ I + Σ K Kᵀ)⁻¹

so the step keeps what it does to its own keys, as far as earlier steps have not claimed them.
"""

from collections.abc import Sequence
from dataclasses import replace

from editkit.edits.edit import Edit
from editkit.errors import ConfigError
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import carried_on, least_squares, plain


def simulated(step: Edit, earlier: Sequence[Edit], carried: Carried, weight: float) -> Edit:
    """The step as SimIE writes it. Its factors have the rank n.

    - `step`: as the method has computed it, with its keys in `memory`.
    - `earlier`: the session's steps before it. `carried`: what the session has computed from them.
    - `weight`: λ.

    Raises ConfigError for a method that remembers no keys.
    """
    deltas = []
    for delta in step.deltas:
        if (keys := step.memory.get(delta.module)) is None:
            raise ConfigError(
                f"method.simie needs the keys of each step, and method={step.provenance.get('method')} remembers none "
                f"of {delta.module}. Use memit_seq, encore, alphaedit or betaedit, or set method.keep_earlier=true."
            )
        keys, width = keys.double(), delta.shape[1]
        alone = plain(weight, width, experts=delta.experts is not None)
        held = carried_on(alone, f"simie {delta.module}", delta.module, earlier, carried)
        left = delta.left.double()
        left = left @ keys if delta.right is None else left @ (delta.right.double() @ keys)
        deltas.append(replace(delta, left=left.float(), right=least_squares(held, keys).float()))
    return replace(step, deltas=tuple(deltas), provenance=step.provenance | {"simie": weight})
